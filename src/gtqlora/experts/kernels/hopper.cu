// Grouped products with frozen 4-bit experts on Hopper: weights go from shared memory to registers (ldmatrix), are dequantized there
// and enter the tensor cores as wgmma's register operand, so a dequantized weight never touches memory.
//
//   out[s, r] = sum_c in[s, c] * W_e[r, c]     forward   (R = outputs, C = inputs)
//   out[s, r] = sum_c in[s, c] * W_e[c, r]     TRANSPOSED: the gradient of the inputs
//
// One producer thread feeds a ring of stages by TMA; two consumer warpgroups of 64 * M results each multiply. Compiled per variant:
//   NF4 0|1, GROUP 32|64|128 (values per scale along the inputs), TRANSPOSED 0|1, M (64-wide tiles of results per warpgroup).
// What bounds it is the rows of `in` coming from L2, so a block takes many results (128 * M) and at most 256 / M rows.
// A tile holds 64 x 64 weights as 16 x 16 blocks of 128 bytes; tiles.py says how.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap { u64 opaque[16]; };

constexpr int CONSUMERS = 2;
constexpr int TILES = CONSUMERS * M;                // of results, per block
constexpr int MAX_ROWS = 256 / M;                   // more accumulators than these do not fit into the registers
constexpr int GRAIN = 16;                           // rows are padded to a multiple of this
constexpr int PER_TILE = GROUP >= 64 ? 64 : 128;    // scales of one tile
constexpr int SHARED_BY = TRANSPOSED && GROUP == 128 ? 2 : 1;  // neighbouring tiles of results with the same scales
constexpr int X_BYTES = MAX_ROWS * 128;             // rows of 64 bf16
constexpr int W_BYTES = TILES * 2048;
constexpr int S_BYTES = TILES / SHARED_BY * PER_TILE * 2;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE_%=;\nbra WAIT_%=;\nDONE_%=:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void load_rows(u32 dst, const TensorMap* map, int col, int row, u32 bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst), "l"(map),
               "r"(bar), "r"(col), "r"(row) : "memory");
}
__device__ __forceinline__ void load_tiles(u32 dst, const TensorMap* map, int column, int row, u32 bar) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
               "l"(map), "r"(bar), "r"(0), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

template <int ROWS>
__device__ __forceinline__ void wgmma(float (&d)[ROWS / 2], const u32 (&a)[4], u64 b);
//WGMMA//

// 128-byte swizzled rows of 64 bf16: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 rows_descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)1 << 16) | ((u64)64 << 32) | ((u64)1 << 62);
}

__device__ __forceinline__ void load_codes(u32 (&w)[4], u32 address) {
#if TRANSPOSED
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
#endif
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(address) : "memory");
}

template <u32 SELECT>
__device__ __forceinline__ u32 permute(u32 a, u32 b) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "n"(SELECT));
  return r;
}
__device__ __forceinline__ u32 permute_by(u32 a, u32 b, u32 select) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(select));
  return r;
}
template <u32 TABLE>
__device__ __forceinline__ u32 logic(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return r;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

#if NF4
// The two bf16 levels of every byte, once for each bank: no two threads of a warp ever wait for each other.
__shared__ u32 levels[256 * 32];
__constant__ u16 LEVELS[16] = {NF4_LEVELS};

__device__ __forceinline__ void fill_levels() {
  for (int i = threadIdx.x; i < 256 * 32; i += blockDim.x) levels[i] = LEVELS[i / 32 & 15] | (u32)LEVELS[i / 512] << 16;
}
#endif

// Eight codes -> v[i][j]: bf16 pairs of weights at (outputs +8i, inputs +8j), unscaled.
__device__ __forceinline__ void decode(u32 (&v)[2][2], u32 x, int lane) {
#if NF4
  u32 found[4];  // of the bytes: i = 0, i = 1 of the first of the pair, then of the second; both j
#pragma unroll
  for (int n = 0; n < 4; n++) found[n] = *(const u32*)((const char*)levels + logic<0xEA>(n ? x >> (8 * n - 7) : x << 7, 0x7F80, 4 * lane));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    v[i][0] = permute<0x5410>(found[i], found[2 + i]);
    v[i][1] = permute<0x7632>(found[i], found[2 + i]);
  }
#else
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      // 0x4300 | code is 128 + code in bf16, exactly
      u32 q = logic<0xEA>(x >> (8 * i + 4 * j), 0x000F000Fu, 0x43004300u);
      asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(v[i][j]) : "r"(q), "r"(0x43084308u));
    }
#endif
}

struct Work { int expert, row, rows, block; };

__device__ __forceinline__ Work work_item(const int4* tiles, int item, int blocks) {
  int4 tile = tiles[item / blocks];
  return {tile.x, tile.y, tile.z, item % blocks};
}

__device__ __forceinline__ int padded(int rows) { return (rows + GRAIN - 1) / GRAIN * GRAIN; }

struct Ring {
  int stage = 0;
  u32 phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) { stage = 0; phase ^= 1; }
  }
};

struct Shared { u32 x, w, s, full, empty; };

struct Maps { TensorMap few_rows, many_rows, codes, scales; };  // 16 rows; 64 rows; a block's tiles; their scales

__device__ __forceinline__ void produce(const Shared& sm, Ring& ring, const Maps& maps, Work work, int R, int C) {
  const int n_rows = padded(work.rows), steps = C / 64;
  // Codes are [experts * outputs / 64][inputs / 64] tiles; scales likewise, by their groups.
  const int first_row = work.expert * ((TRANSPOSED ? C : R) / 64);
  const u32 bytes = n_rows * 128 + W_BYTES + S_BYTES;
  for (int step = 0; step < steps; step++, ring.next()) {
    u32 full = sm.full + 8 * ring.stage;
    barrier_wait(sm.empty + 8 * ring.stage, ring.phase ^ 1);
    barrier_expect(full, bytes);
    u32 x = sm.x + ring.stage * X_BYTES;
    const int row = first_row + (TRANSPOSED ? step : work.block * TILES), column = TRANSPOSED ? work.block * TILES : step;
    load_tiles(sm.w + ring.stage * W_BYTES, &maps.codes, column, row, full);
    load_tiles(sm.s + ring.stage * S_BYTES, &maps.scales, GROUP == 128 ? column / 2 : column, row, full);
    int done = 0;
    for (; done + 64 <= n_rows; done += 64) load_rows(x + done * 128, &maps.many_rows, step * 64, work.row + done, full);
    for (; done < n_rows; done += 16) load_rows(x + done * 128, &maps.few_rows, step * 64, work.row + done, full);
  }
}

// Scales of a warp's 16 x 16 block, as bf16 pairs to multiply the decoded pairs at (i, j) with. In shared memory they lie in the order
// group, block of outputs, b, i, c for the output 2b + c + 8i of the block.
struct Scales {
  u32 pair[2];
  __device__ __forceinline__ void load(u32 tile, int k, int warp, int lane) {
#if TRANSPOSED
    // Block k of the outputs; the pairs are outputs 2b, 2b + 1 in the group of the warp's 16 inputs.
    const int group = GROUP == 32 ? warp >> 1 : 0;
    read(pair[0], pair[1], tile + group * 128 + k * 32 + (lane & 3) * 8);
#else
    // The warp's block of the outputs; both of a pair are output a, in the group of the inputs' block k.
    if (k != 0 && (GROUP != 32 || k != 2)) return;
    u32 x, y;
    read(x, y, tile + (GROUP == 32 ? k >> 1 : 0) * 128 + warp * 32 + (lane >> 3) * 8);
    const u32 both = lane & 4 ? 0x3232 : 0x1010;
    pair[0] = permute_by(x, x, both);
    pair[1] = permute_by(y, y, both);
#endif
  }
  static __device__ __forceinline__ void read(u32& x, u32& y, u32 at) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(at) : "memory");
  }
};

__device__ __forceinline__ void dequantize(u32 (&a)[4], u32 codes, const Scales& scales, int lane) {
  u32 v[2][2];
  decode(v, codes, lane);
  // rows of the operand are outputs (i) and its columns inputs (j), or the other way round
  a[0] = times(v[0][0], scales.pair[0]);
  a[1] = TRANSPOSED ? times(v[0][1], scales.pair[0]) : times(v[1][0], scales.pair[1]);
  a[2] = TRANSPOSED ? times(v[1][0], scales.pair[1]) : times(v[0][1], scales.pair[0]);
  a[3] = times(v[1][1], scales.pair[1]);
}

// Writes a warp's 16 results of each row: accumulators are turned from columns to rows, and neighbours trade halves for wider stores.
template <int ROWS>
__device__ __forceinline__ void store(const float (&acc)[ROWS / 2], u16* corner, int rows, int R, int lane) {
  const bool odd = lane & 1;
  corner += (u64)(lane >> 2) * R + (odd ? 8 : 0) + 2 * (lane & 2);
#pragma unroll
  for (int j = 0; j < ROWS / 8; j++) {
    u32 v[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v[i]) : "f"(acc[4 * j + 2 * i + 1]), "f"(acc[4 * j + 2 * i]));
      asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v[i]));
    }
    const u32 other = __shfl_xor_sync(0xFFFFFFFF, odd ? v[0] : v[1], 1);
    const uint2 four = odd ? make_uint2(other, v[1]) : make_uint2(v[0], other);
    if (8 * j + (lane >> 2) < rows) *(uint2*)(corner + (u64)(8 * j) * R) = four;
  }
}

template <int ROWS>
__device__ __forceinline__ void consume(const Shared& sm, Ring& ring, u16* out, Work work, int R, int C, int group, int warp, int lane) {
  float acc[M][ROWS / 2] = {};  // left undefined, its registers would stay alive across the tiles
  u32 a[2][M][4];               // one step is dequantized while the tensor cores read the other
  // Within a tile a warp's 16 results are a row of blocks, or a column of them.
  const u32 within = TRANSPOSED ? (lane >> 3) * 512 + warp * 128 + (lane & 7) * 16 : warp * 512 + lane * 16;
  u32 previous = 0;
  for (int step = 0; step < C / 64; step++, ring.next()) {
    barrier_wait(sm.full + 8 * ring.stage, ring.phase);
    u32 codes[M][4];
    Scales scales[M];
#pragma unroll
    for (int m = 0; m < M; m++) load_codes(codes[m], sm.w + ring.stage * W_BYTES + (group * M + m) * 2048 + within);
    const u64 rows = rows_descriptor(sm.x + ring.stage * X_BYTES);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int m = 0; m < M; m++) {
        scales[m].load(sm.s + ring.stage * S_BYTES + (group * M + m) / SHARED_BY * PER_TILE * 2, k, warp, lane);
        dequantize(a[k & 1][m], codes[m][k], scales[m], lane);
      }
      wgmma_fence();
#pragma unroll
      for (int m = 0; m < M; m++) wgmma<ROWS>(acc[m], a[k & 1][m], rows + 2 * k);
      wgmma_commit();
      wgmma_wait<1>();
      if (k == 0 && lane == 0 && step > 0) barrier_arrive(previous);
    }
    previous = sm.empty + 8 * ring.stage;
  }
  wgmma_wait<0>();
  if (lane == 0) barrier_arrive(previous);
#pragma unroll
  for (int m = 0; m < M; m++)
    store<ROWS>(acc[m], out + (u64)work.row * R + work.block * (64 * TILES) + (group * M + m) * 64 + warp * 16, work.rows, R, lane);
}

extern "C" __global__ void __launch_bounds__(128 * (1 + CONSUMERS), 1)
grouped(const __grid_constant__ Maps maps, u16* out, const int4* tiles, const int* n_tiles, int R, int C) {
  extern __shared__ u8 raw[];
  u32 base = (shared_address(raw) + 1023) & ~1023u;
  Shared sm = {base, base + STAGES * X_BYTES, base + STAGES * (X_BYTES + W_BYTES), 0, 0};
  sm.full = sm.s + STAGES * S_BYTES;
  sm.empty = sm.full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(sm.full + 8 * i, 1);
      barrier_init(sm.empty + 8 * i, CONSUMERS * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#if NF4
  fill_levels();
#endif
  __syncthreads();
  const int blocks = R / (64 * TILES), total = *n_tiles * blocks;
    Ring ring;
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      for (int item = blockIdx.x; item < total; item += gridDim.x)
        produce(sm, ring, maps, work_item(tiles, item, blocks), R, C);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int group = threadIdx.x / 128 - 1, warp = (threadIdx.x / 32) & 3, lane = threadIdx.x & 31;
    for (int item = blockIdx.x; item < total; item += gridDim.x) {
      Work work = work_item(tiles, item, blocks);
      const int rows = padded(work.rows);
#define CONSUME(N) if (N <= MAX_ROWS && rows == N) consume<(N <= MAX_ROWS ? N : 16)>(sm, ring, out, work, R, C, group, warp, lane)
      CONSUME(16); else CONSUME(32); else CONSUME(48); else CONSUME(64); else CONSUME(80); else CONSUME(96); else CONSUME(112);
      else CONSUME(128);
#if M == 1
      else CONSUME(144); else CONSUME(160); else CONSUME(176); else CONSUME(192); else CONSUME(208); else CONSUME(224); else CONSUME(240);
      else CONSUME(256);
#endif
    }
  }
}

// Decodes NF4's double-quantized absmax, in tile order, to bf16: a block for 64 outputs (x) of an expert (y), four outputs a thread.
// Experts without rows are left out, by their offsets [E + 1].
// codes [E][M * rows / 64][columns / 64][64]; scale [E][M][nested blocks]; offset [E][M], for M matrices of `rows` x `columns`.
extern "C" __global__ void absmax(const u32* codes, const float* values, const float* scale, const float* offset, const int* offsets,
                                  uint2* out, int rows, int columns) {
  if (offsets[blockIdx.y] == offsets[blockIdx.y + 1]) return;
  __shared__ float value_of[256];
  value_of[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  const int tiles = columns / 64, nested = (rows * tiles + 255) / 256;
  const int matrices = gridDim.x * 64 / rows, matrix = blockIdx.y * matrices + blockIdx.x * 64 / rows, first = blockIdx.x * 64 % rows;
  const float shift = offset[matrix];
  scale += (u64)matrix * nested;
  const u64 line = ((u64)blockIdx.y * gridDim.x + blockIdx.x) * tiles * 16;
  for (int at = threadIdx.x; at < tiles * 16; at += 256) {
    const int tile = at / 16, slot = at % 16, n = first + slot / 4 * 16 + slot % 4 * 2;
    const u32 four = codes[line + at];
    u32 found[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float pair[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int block = (n + 8 * i + c) * tiles + tile;
        pair[c] = value_of[four >> (16 * i + 8 * c) & 255] * scale[block / 256] + shift;
      }
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found[i]) : "f"(pair[1]), "f"(pair[0]));
    }
    out[line + at] = make_uint2(found[0], found[1]);
  }
}

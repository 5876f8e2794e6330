// Sorts (token, choice) pairs by expert, stably, and cuts each expert's rows into tiles: all in one block, whatever their number.
//
// A warp takes a stretch of the pairs and counts them by expert; sums over the warps before it then say where its first row of each
// expert goes, so that the order is always the same.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = 1024, WARPS = THREADS / 32, AHEAD = 8;

// Cuts an expert's rows evenly into tiles of `most` rows or fewer, in multiples of `grain` but for the last one; a thread each, and one
// more for experts held elsewhere, which has no tiles. Returns the expert's first row. tiles: expert, first row, rows.
__device__ __forceinline__ int cut(int rows, int4* tiles, int* n_tiles, int count, int most, int grain) {
  __shared__ u64 totals[WARPS];
  const int expert = threadIdx.x, warp = expert / 32, lane = expert % 32;
  const int n = expert < count ? (rows + most - 1) / most : 0;
  // One scan for both: tiles in the upper half, rows in the lower one.
  const u64 both = (u64)n << 32 | (u32)rows;
  u64 sum = both;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const u64 before = __shfl_up_sync(0xFFFFFFFF, sum, d);
    if (lane >= d) sum += before;
  }
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  u64 before = lane < warp ? totals[lane] : 0;
#pragma unroll
  for (int d = 16; d; d /= 2) before += __shfl_xor_sync(0xFFFFFFFF, before, d);
  sum += before - both;
  const int row = (int)(u32)sum, tile = (int)(sum >> 32), height = n ? ((rows + n - 1) / n + grain - 1) / grain * grain : 0;
  for (int i = 0; i < n; i++)
    tiles[tile + i] = make_int4(expert, row + i * height, min(height, rows - i * height), 0);
  if (expert == count) *n_tiles = tile;
  return row;
}

// Calls visit(pair, bucket, same) for the warp's stretch, `same` being the lanes with the same bucket; experts not held come last, and
// past the end the bucket is -1.
template <class Visit>
__device__ __forceinline__ void each_pair(const long long* index, int n_pairs, int first, int count, Visit visit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stretch = (n_pairs + THREADS - 1) / THREADS * 32;
  const int begin = warp * stretch, end = min(begin + stretch, n_pairs);
  for (int start = begin; start < end; start += 32 * AHEAD) {
    long long expert[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int pair = start + 32 * i + lane;
      expert[i] = pair < end ? __ldg(index + pair) - first : 0;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int pair = start + 32 * i + lane;
      if (start + 32 * i >= end) break;
      const int bucket = pair >= end ? -1 : expert[i] < 0 || expert[i] >= count ? count : (int)expert[i];
      visit(pair, bucket, __match_any_sync(0xFFFFFFFF, bucket));
      __syncwarp();
    }
  }
}

// order: the pair of each row; places: the row of each pair; offsets [count + 1]: rows of the expert e are offsets[e] to offsets[e + 1].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
sort_rows(const long long* index, int* order, int* places, int* offsets, int4* tiles, int* n_tiles, int n_pairs, int first, int count,
          int most, int grain) {
  extern __shared__ int counts[];  // [WARPS][count + 1]
  const int bucket = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, buckets = count + 1;
  for (int i = threadIdx.x; i < WARPS * buckets; i += THREADS) counts[i] = 0;
  __syncthreads();
  int* mine = counts + warp * buckets;
  each_pair(index, n_pairs, first, count, [&](int, int found, u32 same) {
    if (found >= 0 && lane == __ffs(same) - 1) mine[found] += __popc(same);
  });
  __syncthreads();
  int rows = 0;
  if (bucket < buckets) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) rows += counts[w * buckets + bucket];
  }
  int at = cut(rows, tiles, n_tiles, count, most, grain);
  if (bucket < buckets) {
    offsets[bucket] = at;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const int found = counts[w * buckets + bucket];
      counts[w * buckets + bucket] = at;
      at += found;
    }
  }
  __syncthreads();
  each_pair(index, n_pairs, first, count, [&](int pair, int found, u32 same) {
    const int row = found < 0 ? 0 : mine[found] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (found >= 0 && lane == __ffs(same) - 1) mine[found] += __popc(same);
    if (found < 0) return;
    order[row] = pair;
    places[pair] = row;
  });
}

// Cuts rows that are sorted already.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
cut_rows(const int* offsets, int4* tiles, int* n_tiles, int count, int most, int grain) {
  const int expert = threadIdx.x;
  cut(expert < count ? offsets[expert + 1] - offsets[expert] : 0, tiles, n_tiles, count, most, grain);
}

"""What each stage leaves in a run directory: a typed record for each artefact, with its file, reader and writer.

How this connects: a stage makes a record and writes it here; the terminal's tables, the report, the model card, the
export and the demo read it here. Nothing in this room loads torch, and nothing in it measures or judges.

| module | file | verb |
|---|---|---|
| `diagnosis` (with `association`, `directions`, `experts`) | `diagnosis/` | `diagnose` |
| `adapter` | `adapter/gtqlora.json` | `train`, `project` |
| `metrics` | `metrics.jsonl` | `train` |
| `verdict` (with `ablation`) | `verdict.json`, `scores.parquet` | `verify` |
| `export` | `export.json` beside the exported weights | `export` |
"""

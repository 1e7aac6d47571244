"""Films and captions to the next version of a dataset."""

from pipeline.ingest.steps import (
    IngestPlan,
    IngestReport,
    commit,
    embed_captions,
    ingest,
    plan_ingest,
    run_blocks,
)

__all__ = [
    "IngestPlan",
    "IngestReport",
    "commit",
    "embed_captions",
    "ingest",
    "plan_ingest",
    "run_blocks",
]

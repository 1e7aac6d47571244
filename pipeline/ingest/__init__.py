"""Films and captions to the next version of a dataset."""

from pipeline.ingest.plan import plan_ingest
from pipeline.ingest.publish import commit
from pipeline.ingest.report import IngestReport
from pipeline.ingest.state import IngestPlan
from pipeline.ingest.steps import carry_out, embed_captions, ingest, run_blocks

__all__ = [
    "IngestPlan",
    "IngestReport",
    "carry_out",
    "commit",
    "embed_captions",
    "ingest",
    "plan_ingest",
    "run_blocks",
]

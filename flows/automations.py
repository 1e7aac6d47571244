"""The automations that belong to the deployments, made (or brought up to date) by `prefect deploy --all`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "AwaitingRetry")
SILENCE = timedelta(seconds=150)
"""Five heartbeats of 30 s (PREFECT_FLOWS_HEARTBEAT_FREQUENCY in prefect.yaml): a run whose process and worker both died
is Crashed within three minutes; a busy machine may be late four times."""


def dead_runs() -> Automation:
    """A run that gives no sign of life any more is Crashed: nobody else would say so when its worker died with it."""
    return Automation(
        name="vlfm: runs whose process and worker died are Crashed",
        description="No heartbeat and no end for a while: the next run takes up what this one had finished.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ENDS)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name=None,
                force=False,
                message="no sign of life: its process and its worker died; run it again, it goes on from what is done",
            )
        ],
    )


def ensure_automations() -> dict[str, Any]:
    """A step of `prefect deploy`: makes the automations, or brings those of the same name up to date."""
    wanted = dead_runs()
    with get_client(sync_client=True) as client:
        there = client.read_automations_by_name(wanted.name)
    if there:
        wanted.id = there[0].id
        wanted.update()
    else:
        wanted.create()
    return {}

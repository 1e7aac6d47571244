"""A backbone that on the clip is shown another state than the solver's, to tell what a sample owes to its states."""

from __future__ import annotations

from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.flow.solver import Path
from model.methods.curves import curve

LOOKS = ("solver", "twice", "first", "truth")
"""`solver`: the solver's state. `twice`: also the state that the first answer makes, and the second answer counts.
`first`: the first frame's state all along, so that no answer rests on another but that one. `truth`: the true state."""


class Looks(nn.Module):
    """A backbone behind one of LOOKS, for the clips of one batch; it counts its calls.

    Args:
        backbone: the network; one state for each clip.
        look: one of LOOKS.
        path: the flow's path.
        mean_scale: what the network's answer is multiplied with to be a mean.
        noise: (B, C, h, w), the path's noise z.
        truth: (B, order, C, h, w), the clips' coefficients; only `truth` looks at them.

    Raises:
        ValueError: an unknown look.
    """

    def __init__(
        self, backbone: nn.Module, look: str, path: Path, mean_scale: float, noise: Tensor, truth: Tensor
    ) -> None:
        if look not in LOOKS:
            raise ValueError(f"look is {look!r}; it must be one of {', '.join(LOOKS)}")
        super().__init__()
        self.backbone, self.look, self.path, self.mean_scale = backbone, look, path, mean_scale
        self.noise, self.truth, self.calls = noise, truth, 0
        self.first: Tensor | None = None

    def forward(self, latents: Tensor, time: Tensor, given: Conditioning) -> dict[str, Tensor]:
        """As `Backbone.forward`, for states (B, 1, C, h, w) that all have one flow time."""
        now = float(time.flatten()[0])
        if now < 0:
            return self._ask(latents, time, given)
        if self.look == "first" and self.first is not None:
            latents = self.first
        elif self.look == "truth":
            latents = self._state(curve(self.truth, time)[0], now)
        found = self._ask(latents, time, given)
        state = self._state(found["mean"] * self.mean_scale, now)
        if now == 0:
            self.first = state
        return self._ask(state, time, given) if self.look == "twice" else found

    def _ask(self, latents: Tensor, time: Tensor, given: Conditioning) -> dict[str, Tensor]:
        self.calls += 1
        answer: dict[str, Tensor] = self.backbone(latents, time, given)
        return answer

    def _state(self, mean: Tensor, now: float) -> Tensor:
        centre, sigma = self.path.evaluate(now, mean)
        return centre + sigma * self.noise[:, None]

"""What a loaded variant takes of the host's memory, seen by a process that does nothing else.

``python -m sievert.engines.run.footprint BUNDLE VARIANT ENGINE [low-memory]`` writes one JSON object.
Source of the numbers: proc(5), ``/proc/pid/status``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sievert.bundle.errors import EngineError
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry, TensorSpec
from sievert.bundle.store import Bundle
from sievert.engines.run.alone import make_feed
from sievert.engines.run.dtypes import Array
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import PromptBatch
from sievert.engines.run.registry import find_runtime

_STATUS = Path("/proc/self/status")
_TAIL = 500
_LOW = "low-memory"


@dataclass(frozen=True)
class Footprint:
    """Bytes of the whole process. ``peak`` is the most that was resident, files mapped into memory included; ``anonymous`` what is no
    mapped file once the first tokens were written.
    """

    peak: int
    anonymous: int


def measure_footprint(bundle: Path, variant: str, engine: str, *, low_memory: bool = False) -> Footprint:
    """Load a variant in a process of its own, read one prompt, write two tokens.

    Raises:
        EngineError: the process failed; the message holds its last words.
    """
    command = [sys.executable, "-P", "-m", "sievert.engines.run.footprint", str(bundle), variant, engine, *([_LOW] if low_memory else [])]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"{variant} on {engine}: the process that measures memory ended with {done.returncode}: {done.stderr[-_TAIL:]}")
    return Footprint(**json.loads(done.stdout))


def load_and_look(bundle: Path, variant: str, engine: str, *, low_memory: bool = False) -> Footprint:
    """The footprint of this process after it answered something.

    Raises:
        VariantError, EngineUnavailableError, EngineError: as :class:`Pipeline`, or a system that does not tell.
    """
    opened = Bundle.open(bundle)
    with Pipeline(opened, variant, find_runtime(engine, low_memory=low_memory)) as pipeline:
        batch = make_prompts(opened.manifest.geometry, pipeline.profile)
        pipeline.prefill(batch, pipeline.encode(batch.pixel_values))
        for slot in range(pipeline.profile.decode_batch):
            pipeline.fill(slot, min(slot, pipeline.profile.batch - 1))
        for _ in range(min(2, pipeline.profile.max_new_tokens)):
            pipeline.decode(np.zeros(pipeline.profile.decode_batch, np.int64))
        return read_footprint()


def make_prompts(geometry: Geometry, profile: Profile) -> PromptBatch:
    """A full batch of prompts as long as the profile allows."""
    batch, length, images = profile.batch, profile.sequence, profile.images
    axes = (geometry.position_axes,) if geometry.position_axes > 1 else ()

    def feed(name: str, *shape: int) -> Array:
        return make_feed(TensorSpec(name=name, dtype="", shape=shape), geometry, profile)

    return PromptBatch(
        pixel_values=feed("pixel_values", batch, *((images,) if images > 1 else ()), *geometry.picture_shape),
        input_ids=feed("input_ids", batch, length),
        attention_mask=feed("attention_mask", batch, length),
        position_ids=feed("position_ids", *axes, batch, length),
        visual_index=feed("visual_index", batch, profile.visual_tokens),
        lengths=(length,) * batch,
        rows=batch,
    )


def read_footprint() -> Footprint:
    """Of this process, now.

    Raises:
        EngineError: the system has no such file.
    """
    try:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        peak, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))
    except (OSError, KeyError, ValueError) as error:
        raise EngineError(f"{_STATUS} does not say how much memory a process takes: {error}") from error
    return Footprint(peak, anonymous)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(load_and_look(Path(sys.argv[1]), *sys.argv[2:4], low_memory=_LOW in sys.argv[4:]))))

"""A runtime that notes what its graphs are fed. It stands between a pipeline and a real runtime, so that what is noted is what ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sievert.engines.run.base import Cache, ModelFile, Runtime, Session, check_feeds
from sievert.engines.run.dtypes import Array
from sievert.engines.run.pipeline import GRAPHS


class RecordingSession:
    """A loaded graph. ``fed`` holds the inputs of the last run in the graph's own types; caches are among them while ``with_caches``.
    ``gave`` holds its outputs, without caches.
    """

    def __init__(self, session: Session, sha256: str) -> None:
        self.inputs = session.inputs
        self.outputs = session.outputs
        self.memory = session.memory
        self.sha256 = sha256
        self.caches: tuple[Cache, ...] = ()
        self.fed: dict[str, Array] = {}
        self.gave: dict[str, Array] = {}
        self.with_caches = False
        self._session = session

    def bind(self, caches: Sequence[Cache]) -> None:
        """As the runtime does."""
        self.caches = tuple(caches)
        self._session.bind(caches)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """As the runtime does, and note what is fed and given."""
        self.fed = self.exact(feeds)
        if self.with_caches:
            self.fed |= {cache.past: cache.buffer.numpy() for cache in self.caches}
        found = self._session.run(feeds, outputs)
        self.gave = dict(found)
        return found

    def exact(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Host arrays as the graph gets them: in its own types."""
        return check_feeds("a graph", self.inputs, self.past, feeds)

    @property
    def past(self) -> set[str]:
        """Names of the inputs that are caches."""
        return {cache.past for cache in self.caches}

    def clear_caches(self) -> None:
        """Write zeros to them: what an earlier, longer prompt left there is masked, but it is no input of this one."""
        for cache in self.caches:
            cache.buffer.clear()


class Recorder:
    """A runtime around another one, for one pipeline."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._loaded: list[RecordingSession] = []

    @property
    def name(self) -> str:
        """As the runtime is called."""
        return self._runtime.name

    @property
    def reads_onnx(self) -> bool:
        """Whether the runtime does."""
        return self._runtime.reads_onnx

    @property
    def tested(self) -> bool:
        """Whether the runtime is."""
        return self._runtime.tested

    def version(self) -> str | None:
        """The runtime's."""
        return self._runtime.version()

    def unavailable(self) -> str | None:
        """Why the runtime cannot run here."""
        return self._runtime.unavailable()

    def load(self, model: ModelFile) -> RecordingSession:
        """As the runtime does."""
        self._loaded.append(RecordingSession(self._runtime.load(model), model.sha256))
        return self._loaded[-1]

    @property
    def sessions(self) -> dict[str, RecordingSession]:
        """The graphs of a pipeline, which loads them in this order."""
        return dict(zip(GRAPHS, self._loaded, strict=True))

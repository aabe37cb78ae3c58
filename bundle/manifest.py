"""``sievert.json``: everything a bundle holds, named. Nothing else carries state between stages."""

from __future__ import annotations

from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry, Record, TensorSpec

FORMAT = 1


class FileEntry(Record):
    """A file of the bundle: size in bytes, and SHA-256 of its content in hexadecimal.

    ``shared``: another bundle has, or had, the same file as a hard link. All others have one name only.
    """

    bytes: int
    sha256: str
    shared: bool = False


class WeightEntry(Record):
    """One tensor of a data file, by content. ``name`` is the checkpoint parameter, with ``.T`` where transposed; ``file`` is empty where it
    stands in the bundle's weights file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    sha256: str
    file: str = ""


class StoredWeight(WeightEntry):
    """A tensor that a variant has of its own, in the data file ``file``: a quantised weight, or its scales."""

    file: str


class Source(Record):
    """Where the model came from. ``model`` is the folder or hub id the user gave; ``remote_code`` names the Python files of its own that
    the bundle carries, which loading its processor runs if the user says so each time.
    """

    model: str
    architecture: str
    family: str
    vision: str
    text: str
    dtype: str
    remote_code: tuple[str, ...] = ()


class GraphEntry(Record):
    """One ONNX graph: its file and everything it takes and gives."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class EngineFile(Record):
    """What one graph became for one engine.

    ``lowered`` is the ONNX file handed to the builder (the graph's own file where the target takes it as it is), ``built_from``
    its SHA-256; ``file`` is the engine, or None where the engine reads ONNX itself.
    """

    lowered: str
    built_from: str
    file: str | None
    builder: str
    seconds: float


class EngineEntry(Record):
    """All graphs of a variant for one engine."""

    target: str
    graphs: dict[str, EngineFile]


class Precision(Record):
    """How the graphs of a variant were narrowed.

    ``base`` is the variant they were made from, ``format`` the number format (a key of ``sievert.calibration.numbers.FORMATS``, a 16-bit
    type, or the model's own type where only caches were narrowed). ``caches`` is the type of the key and value caches where it is not that
    of the graphs, else empty. ``block`` says how many weights along K share a scale (0: each output channel has one). ``calibration`` says
    how the scales of activations were chosen, empty where they are not quantised, and ``unclipped`` names the weights whose activation has
    its largest value for a scale where a percentile would have cut off outliers. ``data`` is the seal of the collection they come from,
    ``samples`` its size, ``random`` whether nobody ever asked these questions. ``kept`` are weights that stay as they were, each with the
    reason; tensors are ``GRAPH/TENSOR``.
    """

    base: str
    format: str
    caches: str = ""
    block: int = 0
    calibration: str = ""
    unclipped: tuple[str, ...] = ()
    data: str = ""
    samples: int = 0
    random: bool = False
    kept: dict[str, str] = {}
    weights: tuple[StoredWeight, ...] = ()

    @property
    def label(self) -> str:
        """The formats in words."""
        return f"{self.format}, caches in {self.caches}" if self.caches else self.format


class Variant(Record):
    """Static graphs over the bundle's weights: ``vision_encoder``, ``embed_tokens``, ``prefill``, ``decode``.

    ``capacities`` are the cache rows of each layer. ``reads_question``: a selector is guided by the text after the image, so there must
    be some. ``precision`` is None where the graphs are of the model's own dtype.
    """

    plan: Plan
    profile: Profile
    capacities: tuple[int, ...]
    graphs: dict[str, GraphEntry]
    engines: dict[str, EngineEntry] = {}
    reads_question: bool = False
    precision: Precision | None = None


class Step(Record):
    """One line of the history: the command, when it finished (UTC, ISO 8601), how long it took, the versions that did it."""

    command: str
    finished: str
    seconds: float
    versions: dict[str, str]


class Manifest(Record):
    """The whole of ``sievert.json``. ``graphs`` are the dynamic ones every variant is made from.

    Where ``weights_file`` is shared with a bundle of another image size, what that one has not stands in a data file of its own.
    """

    format: int = FORMAT
    source: Source
    geometry: Geometry
    weights_file: str
    weights: tuple[WeightEntry, ...]
    files: dict[str, FileEntry]
    graphs: dict[str, GraphEntry]
    variants: dict[str, Variant] = {}
    history: tuple[Step, ...] = ()

    def place(self, weight: WeightEntry) -> str:
        """The data file that a weight stands in."""
        return weight.file or self.weights_file

    @property
    def shared(self) -> frozenset[str]:
        """Files that other bundles may have as hard links."""
        return frozenset(name for name, entry in self.files.items() if entry.shared)

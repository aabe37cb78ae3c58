"""Every error Sievert raises on purpose, in one tree.

::

    SievertError
    +-- InputError                what the user gave cannot be used (exit code 2)
    |   +-- CheckpointError       no checkpoint there, or one that cannot be read safely
    |   |   +-- UnsupportedModelError   a checkpoint of a model Sievert cannot export
    |   +-- PlanError             a pruning plan that cannot be applied
    |   +-- ProfileError          shapes, batches or lengths that do not fit
    |   +-- ImageError            an image that cannot be read, or of the wrong size
    |   +-- PromptError           a prompt that does not fit the profile
    |   +-- CalibrationError      calibration data of another model, changed, or not usable
    +-- BundleError               a bundle that is not what its manifest says (exit code 2)
    |   +-- ManifestError         the manifest is missing, malformed or from a newer version
    |   +-- IntegrityError        a file changed, went missing, or was replaced by a link
    |   +-- VariantError          a variant that does not exist, or already does
    +-- GraphError                a graph without the structure a pass needs
    +-- EngineError               an engine could not be built or run
        +-- EngineUnavailableError      its library, driver or device is not there

Every message says what happened, what was got, what was expected and what to do next.
"""

from __future__ import annotations


class SievertError(Exception):
    """Base class of all errors raised on purpose."""


class InputError(SievertError):
    """What the user gave cannot be used."""


class CheckpointError(InputError):
    """No checkpoint there, or one that cannot be read safely."""


class UnsupportedModelError(CheckpointError):
    """A checkpoint of a model Sievert cannot export; the message names the reason and the supported ones."""


class PlanError(InputError):
    """A pruning plan that cannot be applied to this model."""


class ProfileError(InputError):
    """Shapes, batches or lengths that do not fit the model or each other."""


class ImageError(InputError):
    """An image that cannot be read, or whose size the profile does not take."""


class PromptError(InputError):
    """A prompt that does not fit the profile."""


class CalibrationError(InputError):
    """Calibration data that is of another model, was changed since it was collected, or cannot calibrate anything."""


class BundleError(SievertError):
    """A bundle that is not what its manifest says."""


class ManifestError(BundleError):
    """The manifest is missing, malformed, or from a newer version."""


class IntegrityError(BundleError):
    """A file of the bundle changed, went missing, or was replaced by a link."""


class VariantError(BundleError):
    """A variant that does not exist, or already does."""


class GraphError(SievertError):
    """A graph without the structure a pass needs; the message names the culprit node."""


class EngineError(SievertError):
    """An engine could not be built or run."""


class EngineUnavailableError(EngineError):
    """The library, driver or device an engine needs is not there."""

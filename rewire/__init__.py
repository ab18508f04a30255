"""rewire: change how errors travel backwards through any PyTorch model, in one line."""

from rewire import functional, structures
from rewire.ask import feedback, mirror, output_error, scales
from rewire.checkpoint import config, load_config, save_config
from rewire.convert import convert, restore, use_rule
from rewire.diagnose.alignment import Alignment, alignment
from rewire.diagnose.recorder import Recorder
from rewire.diagnose.verify import verify
from rewire.errors import ConversionError, PassError, RewireError, RewireWarning, RoutingError
from rewire.rules import DirectRule, LocalRule, Rule, register_rule, rules
from rewire.stream import backward_streamed
from rewire.summary import summary
from rewire.targets import targets

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "ConversionError",
    "DirectRule",
    "LocalRule",
    "PassError",
    "Recorder",
    "RewireError",
    "RewireWarning",
    "RoutingError",
    "Rule",
    "alignment",
    "backward_streamed",
    "config",
    "convert",
    "feedback",
    "functional",
    "load_config",
    "mirror",
    "output_error",
    "register_rule",
    "restore",
    "rules",
    "save_config",
    "scales",
    "structures",
    "summary",
    "targets",
    "use_rule",
    "verify",
]

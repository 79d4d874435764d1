"""What users' tests need: a provider that says what a script says, on a real socket."""

from streamjobs.testing.provider import ScriptedProvider, serve
from streamjobs.testing.scenario import DEMO, Scenario, ScriptedCall, Turn, load_scenario, parse_scenario

__all__ = [
    "DEMO",
    "Scenario",
    "ScriptedCall",
    "ScriptedProvider",
    "Turn",
    "load_scenario",
    "parse_scenario",
    "serve",
]

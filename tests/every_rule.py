"""Every rule there is, as it is written: schedules need to be told between what."""

from __future__ import annotations

import rewire

SCHEDULES = {"switch": "switch(first='bp', then='dfa', at=3)", "anchored": "anchored(rule='dfa', every=3)"}
EVERY = {name: SCHEDULES.get(name, name) for name in rewire.rules()}

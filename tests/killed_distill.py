"""A script: a step that is killed in the middle. SOURCE OUT DATA SETTINGS LABEL [METHOD]."""

from __future__ import annotations

KILLED = """
import json, os, signal, sys
from pathlib import Path
from pocketglm.contracts import DataOptions, Silent
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

class Kill(Silent):
    def progress(self, label, done, total, note=""):
        if label.startswith(sys.argv[5]) and done >= total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

plan = Plan.single([*sys.argv, "distill"][6], json.loads(sys.argv[4]))
data = DataOptions(Path(sys.argv[3]))
compress(Path(sys.argv[1]), plan, Path(sys.argv[2]), data=data, reporter=Kill())
"""

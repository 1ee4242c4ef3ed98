"""What a job asks for and what a run is given; the part of trainers that every process may import."""

from trainers.specs.faults import SpecError
from trainers.specs.fields import Resources
from trainers.specs.layouts import Layout
from trainers.specs.methods import METHODS
from trainers.specs.mixture import MixedFile, Share, check_shares, count_mixed
from trainers.specs.parse import Method, parse_method, write_method
from trainers.specs.resolution import halve_micro_batch, resolve
from trainers.specs.run_spec import SPEC_VERSION, RunSpec, load_run_spec

__all__ = [
    "METHODS",
    "SPEC_VERSION",
    "Layout",
    "Method",
    "MixedFile",
    "Resources",
    "RunSpec",
    "Share",
    "SpecError",
    "check_shares",
    "count_mixed",
    "halve_micro_batch",
    "load_run_spec",
    "parse_method",
    "resolve",
    "write_method",
]

from .config import RunConfig as RunConfig
from .launch import resume as resume
from .launch import run as run
from .runs.loop import Outcome as Outcome

"""Clients that answer what they are told to."""

from lora_dp.fed.methods import get_method
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Reply, Update, Workspace
from tests.fed.small import TRAINING, Adapted, make_examples, plan_for

NONE = {"epsilon": None}
WHOLE = {"unit": "client", "delta": 0.01}
SERVER = {**WHOLE, "noise_by": "server"}
CLIENT = {**WHOLE, "noise_by": "client"}


class Told:
    """An engine whose clients answer what ``answers`` says: by how much they move all numbers of their start, or a
    reply, or None for no answer, or a function of the task that returns one of these; 1 where nothing is said."""

    def __init__(self, federation, answers):
        self.federation, self.answers, self.asked = federation, dict(answers), []

    def train(self, tasks, on_step):
        for client, task in tasks:
            self.asked.append((task.round, task.turn, client))
            answer = self.answers.get(client, 1.0)
            answer = answer(task) if callable(answer) else answer
            if isinstance(answer, float):
                names = [
                    n
                    for n in self.federation.workspace.names
                    if self.federation.method.trains(n, task.round, task.turn)
                ]
                answer = Reply(client, Update({name: task.state[name] + answer for name in names}))
            if answer is not None:
                yield answer


def begun(
    method="dp-lora",
    sizes=(10, 30),
    answers=(),
    *,
    privacy=NONE,
    training=TRAINING,
    model=None,
    seed=0,
    reproducible=True,
    validation=5,
    **settings,
):
    """A federation with such clients."""
    made = get_method(method)
    plan = plan_for(
        made, training, **{"clients": len(sizes), "examples": sum(sizes), "rounds": 20, "participations": 20, **privacy}
    )
    trainer = Trainer(Workspace(Adapted() if model is None else model), made, training, plan, seed, reproducible)
    federation = Federation(trainer, None, sizes, make_examples(validation, 99), **settings)
    federation.engine = Told(federation, answers)
    return federation


def failing(client, reason="raised OSError", detail=""):
    return Reply(client, None, reason, detail)

"""Updates of a run, as they are recorded."""

import json

import torch

from lora_dp.fed.rounds.update_statistics import UpdateRecorder


def write_updates(folder, noise: float | None = 1.0) -> list[dict]:
    lines = []
    for number in (1, 2):
        recorder = UpdateRecorder(range(3))
        for client in range(3):
            drawn = torch.randn(50, generator=torch.Generator().manual_seed(10 * number + client)) + 0.5
            recorder.add(client, {"x": drawn}, {"x": torch.zeros(50)}, noise)
        lines.append({"round": number, "turn": 0, **recorder.summary()})
    (folder / "updates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines

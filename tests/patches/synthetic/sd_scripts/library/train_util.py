"""What the miniature trainer needs of an accelerator: accumulation, states, one process."""

import contextlib
import os

import torch


class Accelerator:
    is_main_process = True
    device = torch.device("cpu")

    def __init__(self, accumulation_steps):
        self.accumulation_steps, self.count, self.sync_gradients = accumulation_steps, 0, True
        self.trackers, self.logged = ["memory"], []

    @contextlib.contextmanager
    def accumulate(self, is_last_batch):
        self.count += 1
        self.sync_gradients = is_last_batch or self.count % self.accumulation_steps == 0
        self.count = 0 if is_last_batch else self.count
        yield

    def prepare(self, network, optimizer):
        self.network, self.optimizer = network, optimizer

    def unwrap_model(self, model):
        return model

    def log(self, values, step):
        self.logged.append((step, values))
        print("logged", step, " ".join(sorted(values)))

    def save_state(self, folder):
        os.makedirs(folder, exist_ok=True)
        torch.save(self.network.state_dict(), os.path.join(folder, "network.pt"))
        torch.save(self.optimizer.state_dict(), os.path.join(folder, "optimizer.pt"))

    def load_state(self, folder):
        self.network.load_state_dict(torch.load(os.path.join(folder, "network.pt"), weights_only=True))
        self.optimizer.load_state_dict(torch.load(os.path.join(folder, "optimizer.pt"), weights_only=True))


def resume_from_local_or_hf_if_specified(accelerator, args):
    if args.resume:
        accelerator.load_state(args.resume)

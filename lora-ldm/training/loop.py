"""The training loop: one run from its set-up to its end."""

import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate.utils import broadcast, set_seed
from tqdm import tqdm

from base.sd import load_sd_model
from cs_fluctuation import NonFiniteWeightsError
from es_lora.command_line import NotedSignals
from images.batches import build_datasets
from images.folders import picture_name
from images.loader import make_loader, step_indices
from network.creation import network_from_arguments
from network.folding import fold_base_weights
from network.full_unet import FullUnet, save_full_model
from network.lora import create_network
from network.lora_file import DTYPES, save_lora
from settings.parsing import parse_arguments
from training.checkpoints import CheckpointFiles
from training.class_images import make_class_images
from training.logs import log_measurement, log_step
from training.loss import (
    NoiseSchedule,
    add_noise,
    draw_batch,
    rescale_to_zero_terminal_snr,
    sample_generator,
    sample_losses,
    target,
)
from training.measuring import columns_of_rule, make_monitor, plan
from training.optimizers import make_optimizer
from training.previews import Sampler, read_prompts, untouched_random_state
from training.results import finish, last_lines, lora_metadata
from training.schedule_free import averaged_weights
from training.schedulers import make_scheduler
from training.setup import PRECISIONS, cache_latents, make_accelerator, place_model, start_trackers
from training.shadows import ShadowNetworks
from training.state import Progress, load_state, read_progress, save_state
from training.validation import validation_loss


class NetworkTrainer:
    """One training run: `set_up`, `train`, `finish`. Another model family overrides the methods of the first block."""

    program = "es_lora_ldm"
    is_sdxl = False

    def __init__(self, args):
        self.args = args
        self.columns = {}  # {name: function} of further columns of the history, called at every measurement

    # ------------------------------------------------------------------------------- what depends on the base model

    def assert_supported(self):
        """Refuse what fits this model family's flags but not this base. Raises ValueError."""
        if self.args.zero_terminal_snr and self.model.prediction_type != "v_prediction":
            raise ValueError("--zero_terminal_snr needs a base that predicts v: at the last timestep epsilon is the input")

    def load_model(self):
        args = self.args
        return load_sd_model(
            args.pretrained_model_name_or_path,
            v2=args.v2,
            v_parameterization=args.v_parameterization,
            vae=args.vae,
            dtype=self.base_dtype,
            tokenizer_cache_dir=args.tokenizer_cache_dir,
        )

    def fill_caches(self):
        """Encode once what does not change from epoch to epoch, as far as that is asked for."""
        if self.args.cache_latents:
            cache_latents(self)

    def encode_text(self, captions):
        """What `predict_noise` takes of B captions; with gradients where the text encoder is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_text):
            return self.model.encode_text(
                captions,
                max_token_length=self.args.max_token_length,
                clip_skip=self.args.clip_skip,
                weighted=self.args.weighted_captions,
            )

    @torch.no_grad()
    def encode_images(self, pixels, generator):
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), float32."""
        return self.model.encode_images(pixels, generator).float()

    def predict_noise(self, noisy, timesteps, text_states, batch):
        """The U-Net's prediction (B, 4, h, w). `batch` has what other families condition on (sizes, crops)."""
        return self.model.predict_noise(noisy.to(self.weight_dtype), timesteps, text_states)

    # ------------------------------------------------------------------------------- set up

    def set_up(self):
        """Everything before the first step. Raises ValueError / FileNotFoundError with one message."""
        args = self.args
        self.prompts = read_prompts(args.sample_prompts) if args.sample_prompts else []
        self.accelerator = make_accelerator(args)
        self.is_main = self.accelerator.is_main_process
        resumed = read_progress(args.resume) if args.resume else None
        self.seed = args.seed = resumed.seed if resumed else self._agreed_seed()
        set_seed(self.seed)
        self.weight_dtype = PRECISIONS[args.mixed_precision]
        self.base_dtype = torch.float32 if args.train_full_unet else self.weight_dtype
        if args.num_class_images:
            make_class_images(self)
        self.batches, self.validation_batches = build_datasets(args, self.accelerator.num_processes)
        self.model = self.load_model()
        self.assert_supported()
        fold_base_weights(self.args, self.model)
        self.network, self.network_args = self.create_network()
        self.trains_text = any(component.startswith("te") for component in self.network.components)
        place_model(self)
        alphas = self.model.alphas_cumprod
        alphas = rescale_to_zero_terminal_snr(alphas) if args.zero_terminal_snr else alphas
        self.schedule = NoiseSchedule(alphas, self.model.prediction_type)
        self.fill_caches()
        self.loader, self.order = make_loader(args, self.batches, args.cache_latents and not args.cache_latents_to_disk)
        self._count_steps(resumed)
        self._make_optimizer()
        self.shadows = ShadowNetworks(self) if args.shadows else None
        if resumed:
            load_state(args.resume, self.accelerator, self.network, self.optimizer, self.scheduler, self.shadows)
        elif self.accelerator.process_index:
            torch.manual_seed(self.seed + self.accelerator.process_index)  # dropouts differ between processes
        self._make_monitor()
        with untouched_random_state():
            start_trackers(self.accelerator, args)
        self.outcome_name, self.signals, self.stop_agreed = None, NotedSignals(), False

    def create_network(self):
        """(network with LoRA layers in the model, the parsed --network_args)."""
        if self.args.train_full_unet:
            return FullUnet(self.model.unet), {}

        def make_lycoris(*words, **settings):
            from network.lycoris import create_lycoris_network

            return create_lycoris_network(*words, **settings)

        return network_from_arguments(self.args, self.model, create_network, make_lycoris)

    def _agreed_seed(self):
        """--seed, or one drawn by the first process for all of them."""
        drawn = random.SystemRandom().randrange(2**31) if self.args.seed is None else self.args.seed
        return int(broadcast(torch.tensor([drawn], device=self.accelerator.device))[0])

    def _count_steps(self, resumed):
        args, processes = self.args, self.accelerator.num_processes
        indices = step_indices(len(self.batches), processes, 0, args.gradient_accumulation_steps)
        steps_per_epoch = len(indices)
        self.total_steps = args.max_train_epochs * steps_per_epoch if args.max_train_epochs else args.max_train_steps
        self.total_epochs = -(-self.total_steps // steps_per_epoch)
        self.progress = resumed or Progress(self.seed, steps_per_epoch)
        if resumed and resumed.steps_per_epoch != steps_per_epoch:
            raise ValueError(
                f"--resume {args.resume}: that run had {resumed.steps_per_epoch} steps an epoch, this one has "
                f"{steps_per_epoch}: use the same images, batch size and accumulation"
            )
        if not resumed:
            start = args.initial_step or (args.initial_epoch - 1 if args.initial_epoch else 0) * steps_per_epoch
            whole_epochs = start - start % steps_per_epoch
            self.progress.step = start if args.skip_until_initial_step else whole_epochs
        if self.progress.step >= self.total_steps:
            raise ValueError(
                f"nothing left to train: {self.progress.step} of {self.total_steps} steps are done; raise "
                "--max_train_steps or --max_train_epochs"
            )
        self.files = CheckpointFiles(args, self.total_epochs)

    def _make_optimizer(self):
        args = self.args
        groups = self.network.parameter_groups(args.learning_rate, args.unet_lr, args.text_encoder_lr)
        self.parameters = [weight for group in groups for weight in group["params"]]
        optimizer = make_optimizer(args, groups)
        self.scheduler = make_scheduler(args, optimizer, self.total_steps)
        self.raw_optimizer, self.optimizer = optimizer, self.accelerator.prepare(optimizer)
        if hasattr(optimizer, "train"):
            optimizer.train()

    def _make_monitor(self):
        """The first process measures and decides; the others hear of it after each measurement."""
        args, self.monitor = self.args, None
        if self.shadows is not None:
            self.columns["shadow_loss"] = self.shadows.score
        copies_per_epoch = 1 if args.train_full_unet else 10
        self.safety_copy, self.safety_interval = (0, None), max(1, self.progress.steps_per_epoch // copies_per_epoch)
        if not args.calculate_cs:
            return
        chosen = plan(args, self.network.components, self.progress.steps_per_epoch, self.total_steps)
        rule, self.cs_interval = chosen.rule(), chosen.cs_interval
        if self.shadows is not None:
            self.shadows.measured_every(chosen.cs_interval)
        self.columns.update(columns_of_rule(self, rule))
        if self.is_main:
            header = {"trainer": self.program, "seed": self.seed, "total_steps": self.total_steps}
            batches = len(self.batches) / self.accelerator.num_processes
            self.monitor = make_monitor(args, chosen, self.network, header, batches, self.columns)
            self.say(f"CS every {chosen.cs_interval} steps, window {chosen.window}, rule {rule.name}", *chosen.notices)
            if self.monitor.snapshots is not None and self.monitor.snapshots.every > 1:
                self.say(f"snapshots of every {self.monitor.snapshots.every}th measurement fit into --snapshot_disk_gb")

    def say(self, *lines):
        if self.is_main:
            for line in lines:
                tqdm.write(line, file=sys.stdout)

    # ------------------------------------------------------------------------------- train

    def train(self):
        """Run to the budget, the turning point, an interruption or a divergence; sets `outcome_name`."""
        progress, first = self.progress, self.progress.step
        self.started_at = time.time()
        self.say(
            f"{len(self.batches)} batches and {progress.steps_per_epoch} steps an epoch, {self.total_epochs} epochs, "
            f"{self.total_steps} steps, seed {self.seed}, on {self.accelerator.device}"
        )
        self._keep_safety_copy()
        if self.args.sample_at_first and first == 0:
            self.save_previews("-000000")
        with (
            self.signals,
            tqdm(total=self.total_steps, initial=first, disable=not self.is_main, desc="steps") as bar,
        ):
            while self.outcome_name is None:
                self._train_epoch(bar)
        self.train_seconds = time.time() - self.started_at

    def _train_epoch(self, bar):
        progress = self.progress
        epoch, done = progress.epoch
        if done == 0:
            progress.begin_epoch()
        for batches in self._steps_of_epoch(epoch, done):
            loss = self.train_step(batches)
            if self.outcome_name is not None:
                return
            bar.update()
            bar.set_postfix(loss=f"{progress.epoch_mean_loss:.4f}", refresh=False)
            self._after_step(loss)
            if self.outcome_name is not None:
                return
            if progress.step >= self.total_steps:
                self.outcome_name = "budget_reached"
                break
        if progress.epoch[1] == 0:
            self._after_epoch(epoch + 1)

    def _steps_of_epoch(self, epoch, done):
        """The micro-batches of each remaining optimizer step of an epoch, as lists."""
        args, accelerator = self.args, self.accelerator
        self.batches.set_epoch(epoch)
        steps = step_indices(
            len(self.batches), accelerator.num_processes, accelerator.process_index, args.gradient_accumulation_steps
        )[done:]
        self.order.indices = [index for step in steps for index in step]
        batches = iter(self.loader)
        for step in steps:
            yield [next(batches) for _ in step]

    def train_step(self, batches):
        """One optimizer step over its micro-batches; returns the mean loss over all processes."""
        seen, total = Counter(), torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            noised = self.noised(batch, self._generators(batch, seen))
            loss = self.picture_losses(batch, *noised).mean() / len(batches)
            self.accelerator.backward(loss)
            total += loss.detach()
            if self.shadows is not None:
                self.shadows.backward(batch, noised)
        self._share_gradients()
        loss, interrupted = self._agree(total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm or float("inf"))
        finite = torch.isfinite(loss) and (self.accelerator.scaler is not None or torch.isfinite(norm))
        if not finite:  # with a scaler, gradients that overflow are part of its search
            self.outcome_name = "diverged"
            return float("nan")
        if self.shadows is not None:
            self.shadows.step()
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.args.scale_weight_norms:
            self.norm_facts = self.network.scale_weight_norms(self.args.scale_weight_norms)
        self.progress.step += 1
        self.progress.add_loss(loss.item())
        self.stop_agreed = bool(interrupted)
        return loss.item()

    def noised(self, batch, generators):
        """A micro-batch's latents, noise and noisy latents, (B, 4, h, w) each, and its timesteps (B,)."""
        latents = self.latents_of(batch, generators)
        noise, input_noise, timesteps = draw_batch(self.args, self.schedule, latents, generators)
        return latents, noise, add_noise(self.schedule, latents, input_noise, timesteps), timesteps

    def picture_losses(self, batch, latents, noise, noisy, timesteps):
        """The weighted loss of each picture of a micro-batch, (B,) with gradients."""
        device = self.accelerator.device
        with self.accelerator.autocast():
            states = self.encode_text(batch["captions"])
            prediction = self.predict_noise(noisy, timesteps, states, batch)
        wanted = target(self.schedule, latents, noise, timesteps)
        masks = None if batch["alpha_masks"] is None else batch["alpha_masks"].to(device)
        weights = batch["loss_weights"].to(device)
        return sample_losses(self.args, self.schedule, prediction, wanted, timesteps, weights, masks)

    def latents_of(self, batch, generators):
        """Scaled latents (B, 4, h, w) on the device: cached ones, or encoded now."""
        if batch["latents"] is not None:
            return batch["latents"].to(self.accelerator.device)
        return self.encode_images(batch["images"], generators[0]).to(self.accelerator.device)

    def _generators(self, batch, seen):
        """One random stream a picture: of (seed, step, picture, how often it came in this step, process)."""
        result = []
        for key in map(picture_name, batch["image_keys"]):
            result.append(sample_generator(self.seed, self.progress.step, key, (seen[key], self.accelerator.process_index)))
            seen[key] += 1
        return result

    def _share_gradients(self):
        """Mean of the gradients over the processes: one transfer a step, however many micro-batches it had."""
        if self.accelerator.num_processes == 1:
            return
        for weight in self.parameters:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        flat = self.accelerator.reduce(torch.cat([weight.grad.flatten() for weight in self.parameters]), "mean")
        for weight, part in zip(self.parameters, flat.split([weight.numel() for weight in self.parameters])):
            weight.grad.copy_(part.view_as(weight))

    def _agree(self, loss):
        """(mean loss, whether any process was interrupted), equal on all processes."""
        facts = torch.stack([loss.float(), torch.tensor(float(self.signals.interrupted), device=loss.device)])
        return self.accelerator.reduce(facts, "mean") if self.accelerator.num_processes > 1 else facts

    # ------------------------------------------------------------------------------- after steps and epochs

    def _after_step(self, loss):
        args, step = self.args, self.progress.step
        with averaged_weights(self.raw_optimizer):
            self._measure()
            if step % self.safety_interval == 0 and self.outcome_name is None:
                self._keep_safety_copy()
        log_step(self, loss)
        if args.sample_every_n_steps and not args.sample_every_n_epochs and step % args.sample_every_n_steps == 0:
            self.save_previews(self.files.step_part(step))
        if args.validate_every_n_steps and step % args.validate_every_n_steps == 0:
            self.validate()
        if self.files.step_due(step):
            self.save_checkpoint(self.files.step_part(step))
            self.files.forget_steps(step)
        if self.stop_agreed and self.outcome_name is None:
            self.outcome_name = "interrupted"

    def _after_epoch(self, epochs_done):
        args = self.args
        self.accelerator.log({"loss/epoch_average": self.progress.epoch_mean_loss}, step=self.progress.step)
        every = args.validate_every_n_epochs or (None if args.validate_every_n_steps else 1)
        if every and epochs_done % every == 0:
            self.validate()
        if args.sample_every_n_epochs and epochs_done % args.sample_every_n_epochs == 0:
            self.save_previews(self.files.epoch_part(epochs_done))
        if self.files.epoch_due(epochs_done):
            self.save_checkpoint(self.files.epoch_part(epochs_done))
            self.files.forget_epochs(epochs_done)

    def _measure(self):
        """Measure CS where it is due, and stop everywhere where the rule says so and --early_stop is on."""
        step = self.progress.step
        if not self.args.calculate_cs or step % self.cs_interval:
            return
        told = torch.zeros(1, device=self.accelerator.device)  # 1: a decision, 2: the weights have diverged
        if self.monitor is not None:
            mean_loss, epoch = self.progress.take_mean_loss(), step / self.progress.steps_per_epoch
            try:
                found = self.monitor.measure(step, epoch, loss=mean_loss, lr=float(self.scheduler.get_last_lr()[0]))
                told += found is not None
                log_measurement(self.accelerator, self.monitor)
            except NonFiniteWeightsError:
                told += 2
        if self.accelerator.num_processes > 1:
            told = broadcast(told)
        if told.item() == 2:
            self.outcome_name = "diverged"
        elif told.item() == 1 and self.args.early_stop:
            self.outcome_name = "stopped_early"

    def _keep_safety_copy(self):
        """Weights to fall back on should training diverge; only finite ones are kept."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.network.tensors().items()}
        if all(torch.isfinite(tensor).all() for tensor in copies.values()):
            self.safety_copy = (self.progress.step, copies)

    def validate(self):
        """The held-out loss goes to the logs and the history; it never decides."""
        if self.validation_batches is None or not self.is_main:
            return
        mean = validation_loss(self)
        self.accelerator.log({"loss/validation": mean}, step=self.progress.step)
        if self.monitor is not None:
            self.monitor.note("evaluation", self.progress.step, heldout_loss=mean)

    def save_previews(self, part, folder="sample"):
        """Pictures of --sample_prompts with the present weights; -> [(Prompt, PNG path)]. Random states stay as they are."""
        if not self.prompts or not self.is_main:
            return []
        self.network.eval()
        with torch.no_grad(), averaged_weights(self.raw_optimizer), self.accelerator.autocast():
            sampler = Sampler(self.model, self.encode_text, sampler=self.args.sample_sampler, device=self.accelerator.device)
            made = sampler.save_pictures(
                self.prompts, Path(self.args.output_dir) / folder, f"{self.args.output_name}{part}", self.seed
            )
        self.network.train()
        return made

    # ------------------------------------------------------------------------------- save

    def save_checkpoint(self, part):
        """The present weights under the name with this part, and the state where --save_state asks for it."""
        with averaged_weights(self.raw_optimizer):
            self.save_weights(part, self.network.state_for_file(DTYPES[self.args.save_precision]))
        if self.args.save_state:
            self.save_state(part)

    def save_weights(self, part, tensors, outcome=None):
        """Write the network's tensors as a LoRA file, or the whole model with a full U-Net; returns the path."""
        path, dtype = self.files.path(part), DTYPES[self.args.save_precision]
        if self.is_main and self.args.train_full_unet:
            save_full_model(path, self.model, tensors, dtype)
        elif self.is_main:
            save_lora(path, tensors, lora_metadata(self, outcome), dtype)
        return path

    def save_state(self, part=""):
        path = self.files.state_path(part)
        tensors = self.network.tensors()
        parts = self.optimizer, self.scheduler, self.monitor, self.shadows
        save_state(path, self.accelerator, self.progress, tensors, *parts)
        return path

    def finish(self):
        """Save what the outcome asks for, the result and the report; returns the Outcome."""
        return finish(self)


def show_data(args):
    """--debug_dataset: what the first epoch would train on."""
    args.seed = args.seed or 0
    batches, _ = build_datasets(args)
    for index in range(len(batches)):
        batch = batches[index]
        for key, caption, weight in zip(batch["image_keys"], batch["captions"], batch["loss_weights"].tolist()):
            print(f"batch {index}: {key} | loss weight {weight:g} | {caption}")


def main(argv=None, trainer_class=NetworkTrainer):
    """Run the trainer; returns the exit code."""
    trainer, program = None, trainer_class.program
    try:
        args = parse_arguments(argv, trainer_class.is_sdxl)
        if args.debug_dataset:
            show_data(args)
            return 0
        trainer = trainer_class(args)
        trainer.set_up()
        trainer.train()
        outcome = trainer.finish()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        for line in str(error).splitlines():
            print(f"{program}: {line}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        advice = "lower --train_batch_size or --resolution, or add --gradient_checkpointing or --mixed_precision"
        print(f"{program}: out of memory: {advice} ({str(error).splitlines()[0]})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted at once; what was saved before is whole", file=sys.stderr)
        return 130
    if trainer.is_main:
        prompt = trainer.prompts[0].prompt if trainer.prompts else trainer.batches[0]["captions"][0]
        print("\n".join(last_lines(outcome, args, prompt)))
    return outcome.exit_code

"""Saves a run's pipeline and uploads it, during training and at its end."""

import contextlib
import json
import math
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UsageError
from ..common.files import read_json, write_atomically
from ..common.layout import METRICS_FILE, RUN_FILE, json_or_none
from ..common.ownership import claim_files
from ..evaluation.metrics import METRICS
from ..models.fits import fits_of, use_fits
from ..models.saving import save_half_precision, save_model, save_pipeline
from ..training.averaging import raw_weights
from ..training.plan import StepPlan
from ..training.reporting import parameter_count
from ..training.run import Run
from ..training.setup.held_out import trained_on_held_out
from ..training.setup.optimizer import scaled_learning_rate
from ..training.setup.settings import public_settings
from ..training.state import TrainingState, averaged_weights, unwrap
from . import hub
from .card.facts import datasets_of, read_facts
from .card.illustrations import write_pictures
from .card.merging import make_card
from .files import publishable
from .flags import HELD_OUT_LOSS, PublishingFlags
from .hub import Upload, read_card, reason_of, refuses

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def reserve_repository(run: Run, flags: PublishingFlags, token: str | None, held_out: bool) -> str:
    """Check before training that the Hub accepts the upload; return the full name of the repository.

    The repository is created, but not with --dry_run.

    Args:
        token: with write access to the Hub.
        held_out: whether images are held out.

    Raises:
        UsageError: variants that cannot be saved, or the Hub rejects the upload. If it does not answer, training
            starts, and the upload is tried at its end.
    """
    if run.accelerator.is_fsdp2 and "non_ema" in flags.save_variants:
        raise UsageError("--save_variants non_ema: not with FSDP; the checkpoints' unet/ holds these weights")
    if flags.hub_strategy == "best" and flags.hub_best_metric == HELD_OUT_LOSS and not held_out:
        raise UsageError("--hub_strategy best requires held-out images: give --validation_split 0.1, for example")
    repository = flags.hub_model_id or run.folder.resolve().name
    if not flags.push_to_hub or not run.accelerator.is_main_process:
        return repository
    try:
        if run.flags.dry_run:
            hub.check_account(repository, token)
            return repository
        repository = hub.open_repository(repository, token, flags.hub_private_repo)
        if flags.hub_revision and not run.flags.resume_from_checkpoint:
            hub.check_tag(repository, flags.hub_revision, token)
    except Exception as error:
        if refuses(error):
            raise UsageError(
                f"--push_to_hub: {repository} cannot be written to ({reason_of(error)}); see --hub_model_id,"
                " --hub_token, --hub_private_repo and --hub_revision, or log in with `hf auth login`"
            ) from error
        run.log(f"warning: the Hub does not answer ({reason_of(error)}); trying again at the end")
    return repository


class Publisher:
    """Saves the pipeline of a run, during training and at its end, and uploads it according to the flags.

    Args:
        repository: the result of `reserve_repository`.
        images: the result of `open_images`.
        pipeline_of: trained model -> pipeline.
        shown: the settings that the card lists.
        rows: the classes or prompts of its grids; those that have room count.
    """

    def __init__(
        self,
        run: Run,
        flags: PublishingFlags,
        token: str | None,
        repository: str,
        state: TrainingState,
        plan: StepPlan,
        images: Any,
        pipeline_of: Callable,
        shown: Sequence[str],
        rows: Sequence[str],
    ):
        self.run, self.flags, self.token, self.repository = run, flags, token, repository
        self.state, self.total_steps, self.pipeline_of = state, plan.total, pipeline_of
        parameters = parameter_count(unwrap(run.accelerator, state.model))
        self.record = describe_run(run, images, plan, parameters, shown, rows[: run.flags.eval_batch_size])
        state.sessions.note(dataset=self.record["dataset"], held_out_seen=trained_on_held_out(run, images.count))
        self.folder = run.folder
        run.must_write(self.begin_record, RUN_FILE)
        self.saved_at: int | None = None
        self.uploading: threading.Thread | None = None

    def record_evaluation(self, evaluation: dict[str, Any] | None) -> None:
        """Note what the figures of `--evaluation_epochs` are computed from, for the card."""
        if evaluation is None:
            return
        self.record["evaluation"] = evaluation
        before = [one["evaluation"] for one in self.state.sessions.before if one.get("evaluation")]
        if before and before[-1] != evaluation:
            said = [f"{one['samples']:,} samples, {one['settings']}" for one in (before[-1], evaluation)]
            self.run.warn(f"evaluations were of {said[0]} and are of {said[1]}: only the new ones are compared")
        self.state.sessions.note(evaluation=evaluation)

    def begin_record(self) -> None:
        """Record the run before its pipeline is saved, so that a checkpoint of a stopped run has a complete card."""
        if not (self.folder / RUN_FILE).is_file():
            self.write_record({"sessions": []})

    def write_record(self, more: dict[str, Any]) -> None:
        """Write what is known of the run, and more."""
        claim_files(self.folder, [RUN_FILE])
        write_atomically(self.folder / RUN_FILE, json.dumps(self.record | more, indent=1) + "\n")

    def save(self, model: "torch.nn.Module", step: int) -> None:
        """Save the pipeline if `--hub_strategy` selects this step, and upload it if it says so."""
        flags = self.flags
        at_checkpoint = flags.hub_strategy == "best" or step % self.run.flags.checkpointing_steps == 0
        none_yet = not (self.folder / "model_index.json").is_file()
        if flags.hub_strategy == "best" and not self.is_best(step) and not (none_yet and step == self.total_steps):
            return
        pipeline = self.pipeline_of(model)
        self.keep_fits(pipeline, step)
        save_pipeline(pipeline, self.folder)
        if "fp16" in flags.save_variants:
            save_half_precision(pipeline, self.folder)
        if "non_ema" in flags.save_variants:
            for name, part in self.state.parts.items():
                with raw_weights(self.state.emas[name], part):
                    save_model(part, self.folder / name, "*.non_ema[.-]*", within=self.folder, variant="non_ema")
        self.write_record({"step": step, "sessions": self.state.sessions.until(step)})
        self.saved_at = step
        if flags.push_to_hub and flags.hub_strategy != "end" and at_checkpoint and step < self.total_steps:
            self.upload_in_background(pipeline, step)

    def keep_fits(self, pipeline: "DiffusionPipeline", step: int) -> None:
        """Keep what was fitted to the model that the folder holds, if that is the model of this step."""
        try:
            config, record = (read_json(self.folder / name) for name in ("scheduler/scheduler_config.json", RUN_FILE))
        except ValueError:  # damaged, and about to be replaced
            return
        fits = fits_of(config) if isinstance(config, dict) else {}
        if fits and isinstance(record, dict) and record.get("step") == step:
            use_fits(pipeline, fits)
        elif fits:
            self.run.warn("what was fitted for few steps is removed with the weights that it was fitted to; repeat it")

    def is_best(self, step: int) -> bool:
        """Whether this step has the best figure of `--hub_best_metric` so far, of a held-out loss at checkpoints."""
        lines = [json.loads(line) for line in (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
        name, every, sign = self.flags.hub_best_metric, self.run.flags.checkpointing_steps, 1
        if name != HELD_OUT_LOSS:
            name, every, sign = f"evaluation_{name}", 1, 1 if METRICS[name].lower_is_better else -1
        since = self.state.sessions.since("evaluation") if name != HELD_OUT_LOSS else -1
        judged = [
            line for line in lines if line["step"] == step or (line["step"] > since and line["step"] % every == 0)
        ]
        figures = {line["step"]: sign * line[name] for line in judged if math.isfinite(line.get(name, math.nan))}
        return step in figures and figures[step] <= min(figures.values())

    def upload_in_background(self, pipeline: "DiffusionPipeline", step: int) -> None:
        """Upload while training continues; skip it if the last upload is not finished."""
        if self.uploading is not None and self.uploading.is_alive():
            self.run.log(f"step {step}: the last upload is not finished, so this one is skipped")
            return

        files = contextlib.ExitStack()
        frozen = files.enter_context(publishable(self.folder))  # before training changes the files

        def upload() -> None:
            with files:
                try:
                    self.push(pipeline, f"Step {step}", frozen)
                except Exception as error:  # training must go on
                    self.run.log(f"warning: the upload at step {step} failed ({reason_of(error)})")

        self.uploading = threading.Thread(target=upload, daemon=True)
        self.uploading.start()

    def finish(self, model: "torch.nn.Module", step: int) -> None:
        """Save the pipeline if it is not yet saved, write the card, and upload both with `--push_to_hub`.

        Raises:
            UsageError: the upload failed; the message has the command that repeats it.
        """
        flags = self.flags
        if self.saved_at != step:
            self.save(model, step)
        pipeline = self.pipeline_of(model)
        try:
            write_pictures(self.folder)
            facts = read_facts(self.folder, self.repository, pipeline, flags.hub_license)
            claim_files(self.folder, ["README.md"])
            write_atomically(self.folder / "README.md", make_card(facts, read_card(self.folder), to_hub=False))
        except ValueError as error:
            raise UsageError(f"the model is saved to {self.folder}, but not its card: {error}") from error
        how = ", trust_remote_code=True" if pipeline.needs_trust() else ""
        self.run.log(f"saved to {self.folder}: DiffusionPipeline.from_pretrained('{self.folder}'{how}) loads it")
        if not flags.push_to_hub:
            return
        if self.uploading is not None:
            self.uploading.join()
        try:
            self.repository = hub.open_repository(self.repository, self.token, flags.hub_private_repo)
            with publishable(self.folder) as files:
                upload = self.push(pipeline, "Upload the pipeline", files, flags.hub_revision)
        except Exception as error:  # any error of the network: the trained model is on disk
            raise UsageError(
                f"the upload to {self.repository} failed ({reason_of(error)}); {self.folder} is complete:"
                f" `{self.command()}` uploads it"
            ) from error
        self.run.log(f"published at {upload.address}")

    def close(self, finished: bool) -> None:
        """Publish a model whose training is finished; else log an upload that is aborted. All ranks call it.

        Raises:
            UsageError: as `finish`.
        """
        if finished:
            with averaged_weights(self.state, unwrap(self.run.accelerator, self.state.model)) as trained:
                if self.run.accelerator.is_main_process:
                    self.finish(trained, self.state.step)
        elif self.uploading is not None and self.uploading.is_alive():
            self.run.log(f"an unfinished upload is aborted; `{self.command()}` repeats it")

    def command(self) -> str:
        """The command that uploads the folder according to the flags, without the token."""
        flags = self.flags
        options = ["--private"] if flags.hub_private_repo else []
        for name, value in (("--license", flags.hub_license), ("--revision", flags.hub_revision)):
            options += [name, value] if value else []
        return shlex.join(["ddpm-hf", "push", str(self.folder), self.repository, *options])

    def push(
        self, pipeline: "DiffusionPipeline", message: str, files: dict[str, Path], tag: str | None = None
    ) -> Upload:
        """Upload the files to the run's repository."""
        options = {"license": self.flags.hub_license, "tag": tag}
        return hub.push_files(files, self.folder, self.repository, self.token, pipeline, message=message, **options)


def describe_run(
    run: Run, images: Any, plan: StepPlan, parameters: int, shown: Sequence[str], rows: Sequence[str]
) -> dict[str, Any]:
    """The data of a run that is known before it starts, for its card."""
    settings = public_settings(run.settings)
    dataset, base_model = settings["dataset_name"], settings["pretrained_model_name_or_path"]
    local = settings["train_data_dir"] or (dataset if os.path.exists(dataset or "") else None)
    settings = {name: settings[name] for name in shown}
    if "learning_rate" in settings:
        settings["learning_rate"] = scaled_learning_rate(run.flags, plan.world)
    return {
        "dataset": {
            "name": Path(local).resolve().name if local else images.rows.name,
            "on_hub": bool(dataset and not local),
            "images": images.count,
            "fingerprint": images.rows.fingerprint(),
        },
        "held_out": len(images.held_out) if images.held_out else 0,
        "seed": run.seed,
        "batch": plan.global_batch * plan.accumulation,
        "parameters": parameters,
        "rows": list(rows),
        "base_model": None if os.path.exists(base_model or "") else base_model,
        "base_run": base_run(Path(base_model)) if base_model and os.path.exists(base_model) else None,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }


def base_run(folder: Path) -> dict[str, Any]:
    """Of a local model that a run starts from: its folder's name and, where a run of ours wrote it, its datasets."""
    found = [json_or_none(one / RUN_FILE) for one in (folder, folder.resolve().parent)]
    run = next((one for one in found if isinstance(one, dict) and "sessions" in one), {})  # others have files so named
    return {"name": folder.resolve().name, "datasets": datasets_of(run, base=True)}

"""A run: what each step of train.py's loop needs.

It joins the four parts (optim, rl, run, rewards), which do not know each other. Making the parts
from the config is setup.py's, rewards are scoring.py's, what a step leaves report.py's, checkpoints
and the run's end saving.py's; the algorithm is train.py's.
"""

import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging as transformers_logging

from adaptiverl import saving, setup
from adaptiverl.optim.dynamics import dynamics
from adaptiverl.optim.hyperparams import get
from adaptiverl.optim.online import Online
from adaptiverl.optim.trust_region import LastUpdate, TrustRegion, alignment, tells
from adaptiverl.report import Metrics
from adaptiverl.rl.data import indices_at, wordless
from adaptiverl.rl.reinforce import adapt_kl_coef, kl_per_token
from adaptiverl.rl.rollout import Rollout, uniforms
from adaptiverl.rl.sampler import Sampler, Unreadable, no_tokens
from adaptiverl.run import checkpoint
from adaptiverl.run.config import REWARD_KEYS, Config, UserError
from adaptiverl.run.process import StopSignal
from adaptiverl.run.tracking import RunLog, dynamics_lines
from adaptiverl.saving import State
from adaptiverl.scoring import Batch, Begun, Scoring
from adaptiverl.setup import blame

PROBE = 8  # an update's KL is measured on one in so many completions of a step,
LEAST_PROBED = 4  # on at least so many, or on all,
FEW_TOKENS = 64  # and where these have fewer tokens, exactly, over the whole vocabulary


class Run:
    """A config made real. Every process has one; methods that gather must be called by all."""

    def __init__(self, config: Config):
        c = self.config = config
        self.state = State(kl_coef=c.KL_COEF)
        self.warned: set[str] = set()
        self.output = setup.output(c)
        self.accelerator = setup.accelerator(c)
        set_seed(c.SEED)
        transformers_logging.disable_progress_bar()
        self.own_rows = setup.own_rows(c, self.accelerator)
        setup.hub(c)
        self.prompts, self.eval_prompts = setup.prompts(c)
        self.last_step = setup.last_step(c, len(self.prompts))
        max_prompt = setup.max_prompt(c)
        files = {c.TRAIN_FILE: self.prompts}
        if c.EVAL_FILE and self.eval_prompts:
            files[c.EVAL_FILE] = self.eval_prompts
        self.rewards, held_out = (
            setup.rewards(c, key, files, self.accelerator) for key in REWARD_KEYS
        )
        self.scoring = Scoring(c, self.rewards, held_out)
        setup.check_rules(c, self.last_step)

        self.lock: int | None = None
        self.resumed = folder = saving.newest(self)
        if folder:
            saving.refuse_changes(folder, c)
        self.tokenizer, policy = setup.policy(c, folder, self.accelerator.device)
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self.sampler = Sampler(
            policy,
            self.tokenizer,
            max_prompt,
            c.TEMPERATURE,
            c.TOP_K,
            c.TOP_P,
            server=setup.server(c, policy, self.accelerator),
            synced=self.sharded,
        )
        named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        optimizer = setup.optimizer(c, named, self.sharded)
        if self.sharded:
            policy.gpt2 = False
            self.shards = import_module("adaptiverl.rl.sharded")  # half a second
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        self.controller = setup.controller(c, self.optimizer.optimizer, self.last_step)
        self.region = TrustRegion()
        if folder:
            saving.restore(self, folder)
        self.check()

    @property
    def exact(self) -> bool:
        """Whether sampling and measuring give the same log-probabilities but for fp32 rounding."""
        c = self.config
        return not (c.BF16 or c.FP16 or c.LOAD_4BIT or c.LOAD_8BIT or c.VLLM_SERVER)

    @property
    def coarse(self) -> bool:
        """Whether log-probabilities are rounded even where a policy computes in fp32."""
        return not self.exact and (self.sharded or self.config.LOAD_8BIT)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def batch_at(self, step: int) -> Batch:
        """This process's rows of the step's prompts, each NUM_GENERATIONS times, side by side."""
        c = self.config
        count = c.BATCH_SIZE // c.NUM_GENERATIONS
        rows = indices_at(step - 1, count, len(self.prompts), c.SEED)
        rows = [row for row in rows for _ in range(c.NUM_GENERATIONS)][self.own_rows]
        return self.columns(self.prompts, rows)

    def columns(self, prompts: Dataset, rows: list[int]) -> Batch:
        columns = prompts[rows]
        return columns | {"prompt": columns[self.config.PROMPT_COLUMN]}

    def sample(self, batch: Batch, step: int) -> Rollout:
        """A completion of each prompt; which one follows from the policy, SEED and `step`."""
        c = self.config
        chance = uniforms(c.SEED, step, c.BATCH_SIZE, c.MAX_NEW_TOKENS)[self.own_rows]
        return self.complete(batch["prompt"], chance)

    def complete(self, texts: list[str], chance: Tensor) -> Rollout:
        """A completion of each of `texts`; raises UserError if the policy gives NaN anywhere."""
        try:
            rollout = self.without_gradient(partial(self.sampler, texts, chance))
        except Unreadable as error:
            raise UserError(f"{self.config.PROMPT_COLUMN}: {error}") from error
        self.refuse(rollout.logprobs.isnan().any(), "log-probabilities are")
        return rollout

    def refuse_broken_weights(self) -> None:
        """Raises UserError if a trained weight is not finite: it must not be saved."""
        weights = [p for p in self.policy.parameters() if p.requires_grad]
        if self.sharded:
            weights = self.shards.local(weights)
        self.refuse(~torch.stack([p.isfinite().all() for p in weights]).all(), "weights are")

    def refuse(self, broken: Tensor, what: str) -> None:
        """Ends the run of all processes where the policy of one is broken."""
        if not self.gather(broken[None]).any():
            return
        c, step = self.config, self.state.step
        if not step:
            raise UserError(
                f"MODEL {c.MODEL}: its {what} not finite (NaN). Likely cause: broken weights"
                + (", or FP16 is too narrow for them: use BF16" if c.FP16 else "")
            )
        saved = checkpoint.newest(self.output)
        raise UserError(
            f"step {step}: the policy's {what} not finite (NaN), so the run ends here, and nothing "
            "was saved from this step. Likely cause: an update that was too large"
            + (", or FP16 is too narrow: use BF16" if c.FP16 else "")
            + ". Start a new run with a smaller LRATE or LR_RULE kl_target"
            + (f"; the last checkpoint is {saved[0]}" if saved else "")
        )

    def warn_once(self, kind: str, message: str) -> None:
        if self.is_main and kind not in self.warned:
            logging.warning("step %d: %s", self.state.step, message)
        self.warned.add(kind)

    def without_gradient(self, work: Callable[[], Any], autocast: bool = True) -> Any:
        """What `work` returns. DDP must not see it, or it would wait for gradients; FSDP must."""
        with torch.no_grad(), self.accelerator.autocast() if autocast else nullcontext():
            if not self.sharded:
                return work()
            with self.shards.kept_whole(self.policy):
                return self.policy(work)

    def begin_scoring(self, batch: Batch, rollout: Rollout, completions: list[str]) -> Begun:
        """Starts to score this process's completions; `scores` waits for what was started."""
        return self.scoring.begin(batch, rollout, completions, self.state.step, self.last_step)

    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        pieces = self.config.GRAD_ACCUM
        return self.without_gradient(partial(self.sampler.reference_logprobs, rollout, pieces))

    def gather(self, values: Tensor) -> Tensor:
        """All processes' `values` [B], joined in order, on the CPU."""
        return self.accelerator.gather(values).cpu()

    def stopped_by(self, stop: StopSignal) -> int:
        """The signal that any process has received, so that all stop at the same step; else 0."""
        own = torch.tensor([stop.number], device=self.accelerator.device)
        return int(self.gather(own).max())

    def step(self, rollout: Rollout, grad_norm: Tensor) -> Metrics:
        """The optimizer's step, no further from the policy than KL_STEP_TARGET; what it took."""
        inner = self.optimizer.optimizer
        group = inner.param_groups[0]
        momentum = get(group, "beta1" if "betas" in group else "momentum") or 0.0
        taken: Metrics = {"lr": float(group["lr"]), "momentum": momentum}
        if not grad_norm.isfinite():
            if self.accelerator.scaler:  # scales less from here on
                self.optimizer.step()
            return taken
        braked = "kl_target" in self.controller.lr_rules
        watched = (braked or "learned" in self.controller.lr_rules) and taken["lr"]
        if not watched or not (grad_norm or self.region.settled):  # no gradient yet: no search
            self.optimizer.step()
            return taken
        aligned = alignment(inner)
        if braked and tells(inner):
            self.controller.confidence = self.region.confidence(aligned)
        # Of the whole batch, so that processes probe what one alone would; each needs a row.
        c, first, size = self.config, self.own_rows.start, len(rollout)
        stride = min(PROBE, max(c.BATCH_SIZE // LEAST_PROBED, 1), size)
        rows = torch.arange(-first % stride, size, stride, device=rollout.prompt_of.device)
        probe = rollout.part(rows)
        # One sampled token says little: k3 of 8 of them is off by a factor of three either way. The
        # tables [tokens, V] of more would fill memory, and k3 of 64 is near enough. Coarse
        # log-probabilities are compared with those of sampling, which has the sampled words' only.
        tokens = self.accelerator.reduce(probe.completion_mask.sum(), "sum").item()
        exact = tokens < FEW_TOKENS and not self.coarse
        policy = self.sampler.policy
        words = policy.distributions if exact else policy.logprobs

        def measure() -> Tensor:
            """In full precision where there is one: rounding errors exceed small updates."""
            work = partial(words, probe, c.TEMPERATURE)
            with nullcontext() if self.coarse else policy.in_fp32():
                return self.without_gradient(work, autocast=self.coarse)

        def nats(old: Tensor, new: Tensor) -> float:
            """KL(old ‖ new), nats per token, over the probes of all processes."""
            kl = kl_per_token(old, new, "k3")
            if exact:  # the expectation of k3; a word that neither can say is no difference
                kl = torch.where(old == new, 0.0, old.exp() * kl)
            return self.accelerator.reduce(kl.sum(), "sum").item() / tokens

        before = probe.logprobs if self.exact and not exact else measure()
        self.controller.kl_floor = 2 * nats(probe.logprobs, before) if self.coarse else 0.0
        target, update = self.controller.kl_target, LastUpdate(inner) if braked else None
        self.optimizer.step()
        if update is None:
            kl = nats(before, measure())
            self.controller.observe(kl=kl, alignment=aligned)
            return taken | {"kl_step": kl}
        most = self.controller.bounds["lr"][1] / taken["lr"]
        factor, kl = self.region.fit(lambda: nats(before, measure()), update.rescale, target, most)
        self.state.braked += factor < 1
        self.controller.scale("brake" if factor < 1 else "search", factor, kl)
        # That nothing is left of an update is no sign that the rate was too small.
        self.controller.observe(kl=kl if update.scale else None, alignment=aligned)
        taken["lr"] *= factor
        evidence = round(self.region.evidence, 3)
        taken |= {"kl_step": kl, "kl_step_target": target, "kl_step_evidence": evidence}
        return taken | {"braked": self.state.braked}

    def adapt(self, penalised: Tensor, kl: Tensor, metrics: Metrics) -> None:
        """Moves hyperparameters, the KL coefficient and the running mean that is a baseline."""
        state = self.state
        signals = {name: metrics[name] for name in ("loss", "reward", "grad_norm")}
        self.controller.observe(**signals)
        if isinstance(inner := self.optimizer.optimizer, Online):
            inner.observe(
                loss=metrics["loss"],
                reward=metrics["reward"],
                kl=metrics.get("kl_step"),
                kl_target=metrics.get("kl_step_target"),
                done=state.step / self.last_step,
            )
        self.controller.tick()
        if self.config.KL_TARGET:
            state.kl_coef = adapt_kl_coef(state.kl_coef, kl.mean().item(), self.config.KL_TARGET)
        if not penalised.isnan().all():
            mean, old = penalised.nanmean().item(), state.reward_ema
            state.reward_ema = mean if old is None else 0.9 * old + 0.1 * mean

    def record(self, metrics: Metrics, samples: list[dict], log: RunLog | None) -> None:
        """Writes the step to the run's files and the trackers."""
        reasons, self.controller.audit = self.controller.audit, []
        if log:
            step = {"step": self.state.step}
            inner, every, rows = self.optimizer.optimizer, self.config.DYNAMICS_EVERY, []
            if isinstance(inner, Online) and every and self.state.step % every == 0:
                rows = [step | row for row in dynamics(inner)]
                log.say(dynamics_lines(type(inner).__name__, self.state.step, rows))
            log.step(step | metrics, samples, [entry | step for entry in reasons], rows)
        if self.config.TRACKERS:
            numbers = {name: value for name, value in metrics.items() if value is not None}
            self.accelerator.log(numbers, step=self.state.step)

    def check(self) -> None:
        """Stops before the first step if log-probabilities are not the library's own.

        On the two shortest and the two longest of the first prompts, so that there is padding.
        """
        most, c = self.sampler.max_prompt, self.config
        texts = self.prompts[: min(256, len(self.prompts))][c.PROMPT_COLUMN]
        for source, rows in ((c.TRAIN_FILE, self.prompts), (c.EVAL_FILE, self.eval_prompts)):
            for text in wordless(rows, c.PROMPT_COLUMN) if rows else []:
                if not self.tokenizer(text).input_ids:
                    raise UserError(f"{source}: {no_tokens(text)}")
        sizes = {text: len(self.tokenizer(text).input_ids) for text in texts}
        if self.is_main and most and (cut := sum(size > most for size in sizes.values())):
            logging.warning(
                "%d of %d prompts are longer than the %d tokens that MAX_NEW_TOKENS leaves: they "
                "lose their beginnings",
                cut,
                len(sizes),
                most,
            )
        texts = sorted(texts, key=lambda text: sizes[text])
        texts = texts[:2] + texts[-2:]
        chance = uniforms(c.SEED, 0, len(texts), min(8, c.MAX_NEW_TOKENS))
        rollout = self.complete(texts, chance)
        with blame(f"MODEL {c.MODEL}"):
            self.without_gradient(partial(self.sampler.check, rollout, self.exact))

    def start(self) -> RunLog | None:
        """Prepares OUTPUT_DIR; the log on the main process, None on others."""
        c = self.config
        log = None
        if self.is_main:
            with blame("OUTPUT_DIR"):
                self.lock = checkpoint.lock(self.output)
            if self.resumed:
                print(f"resumed after step {self.state.step} from {self.resumed}")
            else:
                if c.RESUME:
                    print(f"no checkpoint in {self.output} to resume from: starting anew")
                checkpoint.set_aside(self.output)
            step, online = self.state.step, isinstance(self.optimizer.optimizer, Online)
            log = RunLog(self.output, step, self.last_step, c.LOG_EVERY, dynamics=online)
            resolved = c.model_dump_json(by_alias=True, indent=2)
            (self.output / "config.json").write_text(resolved + "\n")
        self.accelerator.wait_for_everyone()
        if c.TRACKERS:
            self.accelerator.init_trackers("adaptiverl", config=_flat(c))
        return log

    def interrupt(self) -> None:
        """Ends the waiting for people, so that a signal is heeded at once."""
        for rewards in (self.rewards, self.scoring.held_out):
            rewards.interrupt()

    def close(self) -> None:
        """Gives back what rewards hold, a terminal or a port, and OUTPUT_DIR."""
        for rewards in (self.rewards, self.scoring.held_out):
            rewards.close()
        if self.lock is not None:
            os.close(self.lock)


def _flat(config: Config) -> dict[str, Any]:
    """The config as trackers take it: numbers and strings."""
    values = config.model_dump()
    return {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in values.items()}

"""You will see TRL's RLOOTrainer learn from a typed rate of 1: the trust region finds the rate.

    python examples/trl_trust_region.py [STEPS]

Five lines bring the trust region into a trainer; they are marked.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

from adaptiverl import AdamMini, AdaptiveOptimizer
from adaptiverl.integrations.trl import RewardTap, TrustRegionCallback
from rewards import ClassifierReward

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "adaptiverl/assets/policy"
PROMPTS = ["This film", "I watched it", "The acting", "My wife"]


def train(steps: int = 20) -> list[dict[str, Any]]:
    """What TRL logged of each step."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    reward = ClassifierReward(model=str(ROOT / "adaptiverl/assets/sentiment"))
    with tempfile.TemporaryDirectory() as scratch:
        args = RLOOConfig(
            output_dir=scratch, per_device_train_batch_size=16, num_generations=4, max_steps=steps,
            max_completion_length=16, learning_rate=1.0, lr_scheduler_type="constant", beta=0.0,
            use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        tap = RewardTap(reward)  # 1: remembers the rewards of a batch
        optimizer = AdaptiveOptimizer(  # 2
            AdamMini(model.parameters(), lr=args.learning_rate), "trust_region", steps=steps
        )
        trainer = RLOOTrainer(
            model=model,
            reward_funcs=tap,  # 3
            args=args,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4 * steps}),
            processing_class=tokenizer,
            optimizers=(optimizer, None),  # 4
        )
        trainer.add_callback(  # 5
            TrustRegionCallback(optimizer, tokenizer, tap.texts, tap.informative)
        )
        trainer.train()
    print(f"the rate found: {optimizer.lr:.1e}, of which 1 was typed")
    return [row for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    rows = train(*map(int, sys.argv[1:]))
    print(f"reward {rows[0]['reward']:.3f} → {rows[-1]['reward']:.3f}")

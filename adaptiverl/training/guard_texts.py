"""What the guards say: the finding, its likely cause, and the key to change."""

NO_GRADIENT = (
    "the gradient is exactly 0 although the rewards differ: nothing is learned. Likely cause: "
    "layers without a backward pass (quantised ones), LORA_TARGETS that the model does not use, or "
    "gradients that FP16 rounds to 0"
)
NAN_GRADIENT = (
    "the gradient is not finite (NaN) in {steps} step(s) in a row, and such steps train nothing. "
    "Likely cause: {cause}"
)
RATE_OF_ZERO = "the learning rate is 0, and no rule moves it from there: nothing is trained (LRATE)"
DRIFT = (
    "the log-probabilities of the samples and of the loss differ by {gap:.2g} nats per token on "
    "average, more than the {allowed:g} that rounding explains: the gradient is not that of the "
    "policy. Likely cause: {cause}"
)
MISSING = "no completion has a reward: {why}. Such a step trains nothing; look at REWARDS"
NO_NUMBERS = (
    "{rewards} gave None, NaN, infinity or a number beyond 1e16 for all of them, or the sum by "
    "WEIGHT is beyond 1e16"
)
NO_LABELS = "{rewards} has no label: people skipped all of them"
NO_LABELS_IN_TIME = "{rewards} has no label: nobody answered within TIMEOUT, or all were skipped"
EQUAL = "all completions got the same reward"
EQUAL_IN_PROMPTS = "within each prompt all completions got the same reward"
CONSTANT = (
    "in each of the last {steps} steps all completions got the same reward, so {trains} "
    "(frac_reward_zero_std). Change REWARDS so that they tell completions apart; if rewards are "
    "rare, raise NUM_GENERATIONS and BATCH_SIZE"
)
ALONE = (
    "rewards are missing for so many completions that {place} has two to compare, and none have "
    "differed for {steps} steps in a row: rewards teach nothing. See why they are missing "
    "(rewards/NAME/missing in metrics.jsonl), or raise {key}"
)
STUCK = (
    "rewards differ between prompts, but the {group} completions of one prompt have had equal "
    "rewards for {steps} steps in a row, and BASELINE {baseline} compares only these: {trains}. "
    "Raise NUM_GENERATIONS, or say BASELINE batch; else change REWARDS so that they tell "
    "completions of a prompt apart"
)
ROUNDED = (
    ". Rewards are compared in 32 bits: of the size of {size:.3g} they are equal if they differ by "
    "less than about {least:.2g}. Subtract what all have in common, or NORMALIZE"
)
DETERMINISTIC = (
    "the policy has hardly any choice from the first step on (entropy {entropy:.2f} nats per "
    "token), and {equal}: raise TEMPERATURE"
)
COLLAPSED = (
    "the policy repeats itself (entropy {entropy:.2f} nats per token, {start_entropy:.2f} in the "
    "first step; distinct-2 {distinct:.2f}, {start_distinct:.2f} in the first step), and {equal}: "
    "it has collapsed. {cause}"
)
SOLVED = (
    "{equal}, after the reward has risen from {before:.3g} to {now:.3g}, and the policy answers "
    "each prompt in its own way ({within:.0%} of two completions of one prompt are equal, "
    "{across:.0%} of two prompts): it has learned one text per prompt. If the reward cannot rise "
    "further, end the run here; else raise TEMPERATURE or KL_COEF, so that it tries other texts"
)
HACKED = (
    "The reward rose from {before:.3g} to {now:.3g}, so REWARDS pay for one text, which the policy "
    "now always writes (samples.jsonl). Likely cause: a reward that can be gamed. Change REWARDS, "
    "raise KL_COEF, or use {smaller}"
)
TOO_LARGE = "Likely cause: an update that was too large. Use {smaller}"
KL_BEYOND = (
    "the policy is {kl:.1f} nats per token away from the first one, for {steps} steps in a row: "
    "its texts have nothing to do with those of the model any more. Likely cause: updates that "
    "were too large. Use {smaller}, or raise KL_COEF"
)
KL_LARGE = (
    "the KL to the first policy has reached {kl:.2f} nats per token ({total:.0f} per completion), "
    "mean of five steps: the policy leaves the model's language. Raise KL_COEF, set "
    "KL_COEF_TARGET, or use {smaller}; STOP_KL ends a run at a KL"
)
ENTROPY = (
    "the entropy has fallen from {before:.2f} to {now:.2f} nats per token, mean of five steps: the "
    "policy soon has one text per prompt, and nothing to learn from. Raise KL_COEF or TEMPERATURE, "
    "or use {smaller}"
)
DISTINCT = (
    "completions repeat each other: the share of different word pairs (distinct-2) has fallen from "
    "{before:.2f} to {now:.2f}, mean of five steps. Likely cause: a reward that pays for a phrase. "
    "Look at samples.jsonl; change REWARDS or raise KL_COEF"
)
PARTED = (
    "{falling} falls while {rising} rises, both beyond {errors:g} standard errors over {count} "
    "{what}: the policy exploits what REWARDS measure, not what they mean. Change REWARDS, raise "
    "KL_COEF, or stop earlier (STOP_PATIENCE, STOP_KL); best/ has the best evaluation"
)
CUT_OFF = (
    "no completion has ended by itself for {steps} steps: all are cut off at MAX_NEW_TOKENS "
    "{tokens}, {since}. If texts should end, raise MAX_NEW_TOKENS, or reward ending (a length "
    "reward with MAX below it)"
)

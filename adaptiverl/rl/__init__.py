"""What is learned: prompts, policy, rollouts, REINFORCE. Knows no optimizer and no config key."""

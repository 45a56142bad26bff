"""The keys of config.json, and how a file becomes values. Knows no model, rule or reward."""

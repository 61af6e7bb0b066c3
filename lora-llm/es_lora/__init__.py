"""Early stopping itself: settings, rules, the monitor, the history, the outcome. It knows no
trainer."""

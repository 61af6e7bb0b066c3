"""Early stopping itself: settings, rules, monitor, history, outcome. It knows no trainer."""

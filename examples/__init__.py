"""Programs that use tfbn as a user would. Run them from the top of the checkout."""

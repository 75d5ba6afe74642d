"""What a person does: pre-train, fine-tune, probe."""

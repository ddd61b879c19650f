"""A store's directory: its files, who has it open, its clock. No record is known here."""

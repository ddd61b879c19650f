"""A store's directory: its files, its members, its clock. No record is known here."""

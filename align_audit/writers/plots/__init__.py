"""Pictures of stored records."""

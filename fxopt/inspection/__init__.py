"""Reading a report: why, pages, differences."""

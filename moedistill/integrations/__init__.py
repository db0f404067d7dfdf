"""The homes of other libraries."""

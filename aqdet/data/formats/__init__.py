"""Readers of annotation formats; each turns files into the records of one :class:`~aqdet.data.check.records.Source`."""

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True,
# initializedcheck=False
# cython: embedsignature=True, freethreading_compatible=False
# The one extension: directives and includes in layer order, no code.
include "_binding/status.pxi"
include "_binding/platform.pxi"
include "_binding/owner.pxi"
include "_binding/columns.pxi"
include "_binding/batch.pxi"
include "_binding/segment.pxi"
include "_binding/compact.pxi"
include "_binding/partition.pxi"
include "_binding/arrow.pxi"
include "_binding/view.pxi"
include "_binding/stream.pxi"
include "_binding/producer.pxi"
include "_binding/message.pxi"
include "_binding/dedup.pxi"
include "_binding/queue_files.pxi"
include "_binding/queue.pxi"
include "_binding/journal.pxi"
include "_binding/heartbeat.pxi"
include "_binding/group.pxi"
include "_binding/membership.pxi"

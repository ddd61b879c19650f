/* More room in a queue: slots and blocks become usable once the files have bytes behind them. */
#ifndef MS_ROOM_H
#define MS_ROOM_H

#include "ms_queue.h"

/* Say that slots below slot_count have blocks behind them (a multiple of the extent, or slot_max).
 * Makes of the new ones beyond `capacity` as many SPARE as the dead need. Holder of maintenance. */
void ms_queue_publish_slots(ms_queue *queue, uint32_t slot_count);
void ms_queue_publish_blocks(ms_queue *queue, uint32_t block_count);

#endif

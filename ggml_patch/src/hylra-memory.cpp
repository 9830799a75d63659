// Asks the system for huge pages; it may refuse, and then everything works as before.
#include "hylra-memory.h"

#include <cstdint>

#if defined(__linux__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

void hylra_advise_huge_pages(void * data, size_t size_bytes) {
#if defined(MADV_HUGEPAGE)
    // whole pages only: what lies beside the buffer on its first and last page belongs to others
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (uintptr_t(data) + page - 1)/page*page, end = (uintptr_t(data) + size_bytes)/page*page;
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_HUGEPAGE);
    }
#else
    (void) data;
    (void) size_bytes;
#endif
}

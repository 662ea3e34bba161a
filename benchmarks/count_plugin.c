/* A plugin for QEMU's user-mode emulator: prints how many instructions the program executed, over all threads.
 *
 * benchmarks/instructions.py builds and uses it. Debian packages neither QEMU's examples nor the header, so the
 * functions used are declared here. */
#include <inttypes.h>
#include <stdio.h>

struct qemu_plugin_tb; /* a block of instructions without jumps in between, always entered at its beginning */
typedef uint64_t qemu_plugin_id_t;

extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                                  void (*callback)(qemu_plugin_id_t, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, void (*callback)(unsigned, void *),
                                                 int flags, void *userdata);
extern void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, void *),
                                           void *userdata);

#ifndef AGQ_QEMU_API
#define AGQ_QEMU_API 1 /* of QEMU 4.2 to 8.2; 2 from 9.0 on */
#endif
__attribute__((visibility("default"))) int qemu_plugin_version = AGQ_QEMU_API;

static uint64_t executed;

static void on_execution(unsigned cpu, void *instructions) {
    (void)cpu;
    __atomic_fetch_add(&executed, (uint64_t)(uintptr_t)instructions, __ATOMIC_RELAXED);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_execution, 0, (void *)(uintptr_t)qemu_plugin_tb_n_insns(tb));
}

static void on_exit_of_program(qemu_plugin_id_t id, void *unused) {
    (void)id, (void)unused;
    fprintf(stderr, "instructions: %" PRIu64 "\n", executed);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc,
                                                               char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_atexit_cb(id, on_exit_of_program, NULL);
    return 0;
}

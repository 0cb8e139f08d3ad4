// Hops without Python between them: the attention side runs a micro-batch through the layers, the FFN side serves calls one after
// the other, over memory that both share and a unix socket for the headers.
//
// Only the usual case is done here: whole frames, expected ones, one at a time. Whatever else there is, a late answer, a failure, a
// lost connection, nonsense, is left in the socket, and the function returns: its caller goes on the long way (transport/link.py,
// server_side.py), which is also what this must equal to the bit. The frame is the one of transport/frames.py.
#pragma once

#include <cstring>
#include <vector>

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

#include "experts.h"
#include "layer.h"

namespace afd {

enum FrameKind : uint8_t { CALL = 1, ANSWER = 2 };

#pragma pack(push, 1)
struct Frame {
    char magic[4];
    uint8_t version, kind, micro_batch, routed, wire_dtype;
    uint8_t padding[3];
    uint32_t replica, layer;
    uint64_t step, sequence;
    uint32_t rows;
    uint64_t payload_bytes;
    uint32_t ffn_us, queue_us, batch_rows;
};
#pragma pack(pop)
static_assert(sizeof(Frame) == 60);

// As Python's time.monotonic().
inline double now_s() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Whether exactly one frame has arrived; it stays where it is. Less or more of it, or the end of the connection, is for the long way.
inline bool peek(int socket, Frame& frame) {
    char bytes[sizeof(Frame) + 1];
    if (recv(socket, bytes, sizeof bytes, MSG_PEEK | MSG_DONTWAIT) != ssize_t(sizeof(Frame))) return false;
    std::memcpy(&frame, bytes, sizeof frame);
    return true;
}

inline void take(int socket) {
    Frame frame;
    (void)!recv(socket, &frame, sizeof frame, MSG_DONTWAIT);
}

// Bytes sent: all, none, or, where the socket breaks or is full, fewer.
inline long give(int socket, const Frame& frame) {
    const ssize_t sent = send(socket, &frame, sizeof frame, MSG_NOSIGNAL | MSG_DONTWAIT);
    return sent < 0 ? 0 : long(sent);
}

// Sums of a layer since the worker was loaded; telemetry/layer_totals.py has the same fields.
struct LayerTotal {
    double seconds;
    long batches, rows;

    void add(double more_s, long more_rows) { seconds += more_s, batches++, rows += more_rows; }
};

// --- the attention side ---------------------------------------------------------------------------------------------------------

// When a layer's computing began and ended, and when its answer came.
struct HopTimes {
    double began, computed, received;
};

// A micro-batch on its way through the layers. first: the first call's frame. call_bytes: of a row, without and with experts.
// normed, ids, weights, answer: the link's slot. kernels/hop.py has the same fields.
struct Run {
    long socket;
    Frame* frame;
    const GroupedQueryLayer* const* layers;
    void* const* caches;
    long num_layers, call_bytes, routed_bytes;
    double patience_s;
    // What it did: answers had, calls sent (the last one in part if `torn`), whether one did not come in time, seconds, and when
    // the last answer came.
    long answered, sent, torn, late;
    double computing_s, waiting_s, ffn_s, wire_s, answered_at;
    long ffn_rows;
    // By layer, of those that were answered.
    HopTimes* times;
    LayerTotal* totals;
};

// compute(layer, answer of the layer before or null): the attention side of a layer, into the slot.
template <class Compute>
void run_layers(Run& run, long rows, const float* answer, long hidden, const Compute& compute) {
    Frame& frame = *run.frame;
    for (long layer = 0; layer < run.num_layers; layer++) {
        const double started = now_s();
        compute(layer, layer ? answer : nullptr);
        frame.layer = uint32_t(layer);
        frame.routed = run.layers[layer]->router.packed != nullptr;
        frame.payload_bytes = uint64_t(rows) * (frame.routed ? run.routed_bytes : run.call_bytes);
        const double computed = now_s();
        run.computing_s += computed - started;
        const long sent = give(int(run.socket), frame);
        run.sent += sent > 0;
        run.torn = sent > 0 && sent < long(sizeof frame);
        if (sent < long(sizeof frame)) return;
        pollfd ready{int(run.socket), POLLIN, 0};
        const int came = poll(&ready, 1, int(run.patience_s * 1000));
        run.late = came == 0;
        Frame got;
        const bool usual = came > 0 && peek(int(run.socket), got);
        const double received = now_s();
        run.waiting_s += received - computed;
        if (!usual) return;
        Frame expected = frame;
        expected.kind = ANSWER;
        expected.payload_bytes = uint64_t(rows) * hidden * sizeof(float);
        expected.ffn_us = got.ffn_us, expected.queue_us = got.queue_us, expected.batch_rows = got.batch_rows;
        if (std::memcmp(&expected, &got, sizeof got)) return;
        take(int(run.socket));
        const double at_worker_s = 1e-6 * (double(got.ffn_us) + got.queue_us);
        run.ffn_s += 1e-6 * got.ffn_us;
        run.wire_s += std::max(0.0, received - computed - at_worker_s);
        run.ffn_rows += got.batch_rows;
        run.answered_at = received;
        run.times[layer] = {started, computed, received};
        run.totals[layer].add(computed - started, rows);
        run.answered++;
        frame.sequence++;
    }
}

// --- the FFN side ---------------------------------------------------------------------------------------------------------------

// The experts that a worker holds of a layer. routed = 0: a dense layer, one expert for every row. gate_up = null: not for here.
struct FFNLayer {
    const char *gate_up, *down;
    long format, width, first_expert, num_experts, routed;
};

// A link that shares memory, in float32. memory: of slot 0; the places are bytes from a slot's start. latest: a sequence number for
// each micro-batch, which the long way reads and writes too.
struct ServedLink {
    long socket, replica, max_rows, top_k;
    char* memory;
    long slot_bytes, ids_at, weights_at, answer_at;
    uint64_t* latest;
};

// A call that was served.
struct CallNote {
    double began, ended;
    uint64_t step;
    uint32_t replica, layer, micro_batch, rows;
};

// wire: a frame with what is the same in all of them. unsent: bytes of `answer` that did not leave for links[to]. notes: of the calls
// that were served, as far as there is room for them. totals, expert_tokens: by layer; of the latter, num_experts each between
// two that are not for here: how often each expert of the layer was chosen that is held here, by its number among them.
struct Service {
    const FFNLayer* layers;
    const ServedLink* links;
    long num_layers, num_links, hidden, num_slots, threads, epoll;
    const Frame* wire;
    long unsent, to;
    Frame answer;
    CallNote* notes;
    long max_notes, num_notes;
    LayerTotal* totals;
    long* expert_tokens;
    long num_experts;
};

inline void count_choices(Service& service, const FFNLayer& layer, long index, const int32_t* ids, long count) {
    long* tokens = service.expert_tokens + index * (service.num_experts + 2) + 1;
    for (long at = 0; at < count; at++) {
        const long expert = ids[at] - layer.first_expert;
        if (expert >= 0 && expert < std::min(layer.num_experts, service.num_experts)) tokens[expert]++;
    }
}

inline bool is_usual(const Service& service, const ServedLink& link, const Frame& call) {
    if (call.kind != CALL || call.micro_batch >= service.num_slots || call.layer >= service.num_layers) return false;
    Frame expected = call;
    std::memcpy(&expected, service.wire, offsetof(Frame, micro_batch) - 1);  // magic, version
    expected.wire_dtype = service.wire->wire_dtype;
    std::memset(expected.padding, 0, sizeof expected.padding);
    const FFNLayer& layer = service.layers[call.layer];
    const long bytes = service.hidden * sizeof(float) + (call.routed ? link.top_k * 8 : 0);
    expected.payload_bytes = uint64_t(call.rows) * bytes;
    return !std::memcmp(&expected, &call, sizeof call) && layer.gate_up && call.routed == layer.routed &&
           call.replica == link.replica && call.rows >= 1 && call.rows <= link.max_rows &&
           call.sequence > link.latest[call.micro_batch];
}

// compute(layer, x, rows, top_k, ids, weights, y). Serves until `until`, in seconds, or until something is for the long way.
template <class Compute>
void serve_calls(Service& service, double until, const Compute& compute) {
    static thread_local std::vector<int32_t> first_expert;  // the choice of every row in a dense layer
    static thread_local std::vector<float> whole;
    for (double now = now_s(); now < until; now = now_s()) {
        epoll_event events[2];
        if (epoll_wait(int(service.epoll), events, 2, int((until - now) * 1000) + 1) != 1 || events[0].events != EPOLLIN) return;
        long index = 0;
        while (index < service.num_links && service.links[index].socket != events[0].data.fd) index++;
        Frame call;
        if (index == service.num_links || !peek(events[0].data.fd, call)) return;
        const ServedLink& link = service.links[index];
        if (!is_usual(service, link, call)) return;
        take(int(link.socket));
        link.latest[call.micro_batch] = call.sequence;
        const double started = now_s();
        const FFNLayer& layer = service.layers[call.layer];
        char* slot = link.memory + call.micro_batch * link.slot_bytes;
        const int32_t* ids = reinterpret_cast<int32_t*>(slot + link.ids_at);
        const float* weights = reinterpret_cast<float*>(slot + link.weights_at);
        if (!call.routed && whole.size() < call.rows) first_expert.resize(call.rows, 0), whole.resize(call.rows, 1.0f);
        compute(layer, reinterpret_cast<float*>(slot), long(call.rows), call.routed ? link.top_k : 1,
                call.routed ? ids : first_expert.data(), call.routed ? weights : whole.data(),
                reinterpret_cast<float*>(slot + link.answer_at));
        Frame answer = call;
        answer.kind = ANSWER;
        answer.payload_bytes = uint64_t(call.rows) * service.hidden * sizeof(float);
        const double ended = now_s();
        answer.ffn_us = uint32_t((ended - started) * 1e6 + 0.5);
        answer.queue_us = 0;
        answer.batch_rows = call.rows;
        // Before the answer leaves: then the slot is the caller's again.
        if (call.routed) count_choices(service, layer, call.layer, ids, long(call.rows) * link.top_k);
        const long sent = give(int(link.socket), answer);
        service.totals[call.layer].add(ended - started, call.rows);
        if (service.num_notes < service.max_notes)
            service.notes[service.num_notes++] = {started, ended, call.step, call.replica, call.layer, call.micro_batch, call.rows};
        if (sent < long(sizeof answer)) {
            service.answer = answer, service.unsent = long(sizeof answer) - sent, service.to = index;
            return;
        }
    }
}

}  // namespace afd

/// What ended an attempt to send the memory, when another one may follow.
struct MemoryLost: Error {
    let reason: String
}

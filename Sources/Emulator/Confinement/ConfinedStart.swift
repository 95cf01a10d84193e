internal import CLinux
internal import Glibc

/// The start of a program, with or without a confinement.
enum ConfinedStart {
    /// Calls a function of `xd_spawn` with what it needs.
    ///
    /// - Parameters:
    ///   - confinement: nil for a program that is not confined, which gets the whole environment.
    ///   - program: for messages.
    ///   - start: gets the confinement, the environment and where the failed step goes; returns the process number or -1 with errno.
    /// - Throws: `GuestError` that names the program and what failed.
    static func run(
        _ confinement: Confinement?,
        _ program: String,
        _ start: (
            UnsafePointer<xd_confinement>?, UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?,
            UnsafeMutablePointer<Int32>
        ) -> pid_t
    ) throws -> pid_t {
        var step: Int32 = 0
        guard let confinement else {
            let pid = start(nil, environ, &step)
            return try checked(pid, errno, step, program)
        }
        try HandOver.carryOut(confinement)
        let ruleset = try LandlockRuleset(confinement)
        var environment = Confinement.environment.map { strdup($0) } + [nil]
        defer { for pointer in environment { free(pointer) } }
        let (pid, number) = confinement.groups.withUnsafeBufferPointer { groups in
            var raw = xd_confinement(
                landlock: ruleset.descriptor,
                user: confinement.user.map(Int64.init) ?? -1,
                groups: groups.baseAddress,
                group_count: Int32(groups.count),
                isolates_network: confinement.isWithoutNetwork ? 1 : 0,
                descriptors: Confinement.descriptors,
                locked: confinement.lockedBytes ?? 0
            )
            let pid = start(&raw, &environment, &step)
            return (pid, errno)
        }
        return try checked(pid, number, step, program)
    }

    private static func checked(_ pid: pid_t, _ number: Int32, _ step: Int32, _ program: String) throws -> pid_t {
        guard pid <= 0 else { return pid }
        let words = String(cString: strerror(number))
        let steps = [
            XD_STEP_LIMITS: "its limits cannot be set", XD_STEP_CAPABILITIES: "its capabilities cannot be dropped",
            XD_STEP_USER: "it cannot become its own user", XD_STEP_PRIVILEGES: "it cannot be kept from new privileges",
            XD_STEP_FILES: "Landlock does not take its rules",
        ]
        guard let failed = steps[Int(step)] else {
            throw GuestError("Cannot start \(program): \(words)")
        }
        throw GuestError("Cannot start \(program) confined: \(failed): \(words)")
    }
}

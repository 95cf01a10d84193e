internal import IO
internal import Migration

/// What the rehearsal of a guest says, as findings.
struct GuestFindings {
    /// The findings: what fails first.
    let findings: [Finding]

    /// The part of a line that a guest may fill with changes.
    private static let share = 0.7

    init(_ report: MigrationReport, _ warnings: [String], _ plan: MigrationPlan) {
        var findings = (report.obstacles ?? []).map {
            Finding($0.check, .fail, message: $0.reason, remedy: Self.remedy(of: $0.check, plan), guest: plan.guest)
        }
        if findings.isEmpty, report.outcome != .rehearsed {
            findings.append(
                Finding(.rehearsal, .fail, message: report.reason ?? "The rehearsal failed", guest: plan.guest)
            )
        }
        findings += warnings.map { Finding(.rehearsal, .warn, message: $0, guest: plan.guest) }
        if let rehearsal = report.rehearsal {
            if report.outcome == .rehearsed {
                findings.append(
                    Finding(
                        .machine,
                        .ok,
                        here: rehearsal.emulatorHere,
                        there: rehearsal.emulatorThere,
                        guest: plan.guest
                    )
                )
                findings.append(
                    Finding(
                        .space,
                        .ok,
                        here: "\(ByteSize.text(rehearsal.diskBytes)) in use",
                        there: "\(ByteSize.text(rehearsal.freeBytes & ~((1 << 20) - 1))) free",
                        guest: plan.guest
                    )
                )
            }
            findings.append(Self.convergence(rehearsal, plan))
        }
        self.findings = findings
    }

    private static func convergence(_ rehearsal: MigrationReport.Rehearsal, _ plan: MigrationPlan) -> Finding {
        let changes = (rehearsal.memoryDirtyRate ?? 0) + (rehearsal.diskWriteRate ?? 0)
        let rate = rehearsal.bytesPerSecond
        let (here, there) = ("changes \(text(changes))/s", "\(text(rate))/s")
        guard changes > rate * share else {
            return Finding(.convergence, .ok, here: here, there: there, guest: plan.guest)
        }
        return Finding(
            .convergence,
            .warn,
            here: here,
            there: there,
            message:
                "Guest '\(plan.guest)' changes more than \(Int(share * 100)) % of what one connection carries: it may have to be slowed down",
            remedy: "move it when it has less to do, or with a higher --downtime-limit",
            guest: plan.guest
        )
    }

    private static func text(_ bytes: Double) -> String {
        ByteSize.text(UInt64(min(max(bytes, 0), 1e18)) & ~((1 << 10) - 1))
    }

    /// Where the remedy is not in the sentence already.
    private static func remedy(of check: Check, _ plan: MigrationPlan) -> String? {
        switch check {
        case .programs: "apt-get install qemu-system-x86 qemu-utils, on \(plan.host)"
        case .leftovers: "crossdock status; crossdock guest list, on \(plan.host)"
        case .space: "make room on \(plan.host), or --image-dir in /etc/crossdock/destination"
        case .memory, .policy: "/etc/crossdock/policy on \(plan.host); docs/security.md"
        case .listeners: "ss -ltnp, on \(plan.host)"
        case .network: "ip link, and /etc/crossdock/policy, on \(plan.host)"
        case .blockers, .devices, .files: "crossdock guest show \(plan.guest)"
        case .processor, .machine: "docs/versions.md, docs/guests.md"
        default: nil
        }
    }
}

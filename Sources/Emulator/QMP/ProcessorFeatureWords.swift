/// The registers of the CPUID instruction in which an x86 processor tells its features, as QEMU's `feature-words` has them, and which bit of
/// them each of QEMU's properties is (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; QEMU's names).
///
/// QEMU reads its monitor one byte at a time, and a processor has some four hundred properties: one answer tells most of them.
enum ProcessorFeatureWords {
    /// A bit of a register.
    private struct Bit {
        /// Which register of which leaf: `0x7,0 EBX`.
        var word: String
        var index: UInt64
    }

    /// The properties of a processor that its feature words tell.
    ///
    /// - Parameters:
    ///   - names: the wanted properties.
    ///   - words: the answer to `qom-get` of `feature-words`. Words that are missing tell nothing.
    static func read(_ names: [String], from words: JSONValue) -> [String: JSONValue] {
        var registers: [String: UInt64] = [:]
        for word in words.array {
            guard let leaf = word["cpuid-input-eax"]?.integer, let register = word["cpuid-register"]?.string,
                let features = word["features"]?.integer
            else { continue }
            let part = word["cpuid-input-ecx"]?.integer.map { ",\($0)" } ?? ""
            registers["0x\(String(leaf, radix: 16))\(part) \(register)"] = UInt64(clamping: features)
        }
        func value(_ name: String) -> Bool? {
            guard let bit = bits[name], let word = registers[bit.word] else { return nil }
            return word >> bit.index & 1 == 1
        }
        // Without virtual machines in the guest there is nothing that these could offer it: QEMU clears them (target/i386/cpu.c, the
        // features that depend on others).
        let isWithoutVMX = value("vmx") == false
        return names.reduce(into: [:]) { found, name in
            if let value = value(name) {
                found[name] = .bool(value)
            } else if isWithoutVMX, name.hasPrefix("vmx-") {
                found[name] = false
            }
        }
    }

    private static let bits: [String: Bit] = {
        var bits: [String: Bit] = [:]
        var word = ""
        var index: UInt64 = 0
        for token in table.split(whereSeparator: \.isWhitespace) {
            if token.hasPrefix("0x") {
                (word, index) = (String(token), 0)
            } else if token.hasSuffix(":") {
                word += " \(token.dropLast())"
            } else if token.hasPrefix("-") {
                index += UInt64(token.dropFirst()) ?? 1
            } else {
                for name in token.split(separator: "/") { bits[String(name)] = Bit(word: word, index: index) }
                index += 1
            }
        }
        return bits
    }()

    /// Each register with its bits from the lowest one. A bit has one name or several; `-N` stands for N bits without one.
    private static let table = """
        0x1 ECX: pni/sse3 pclmuldq/pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm -
          pcid dca sse4-1/sse4.1 sse4-2/sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor
        0x1 EDX: fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx
          fxsr sse sse2 ss ht tm ia64 pbe
        0x6 EAX: -2 arat
        0x7,0 EBX: fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - zero-fcs-fds mpx
          - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf avx512er avx512cd
          sha-ni avx512bw avx512vl
        0x7,0 ECX: - avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni avx512bitalg -
          avx512-vpopcntdq - la57 -5 rdpid - bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks
        0x7,0 EDX: -2 avx512-4vnniw avx512-4fmaps fsrm -3 avx512-vp2intersect - md-clear -3 serialize - tsx-ldtrk -2
          arch-lbr -2 amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities
          core-capability ssbd
        0x7,1 EAX: sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd -2 fzrm fsrs fsrc -4 fred lkgs wrmsrns - amx-fp16
          - avx-ifma -2 lam
        0x7,1 EDX: -4 avx-vnni-int8 avx-ne-convert -2 amx-complex - avx-vnni-int16 -3 prefetchiti -4 avx10
        0x7,2 EDX: intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no
        0xd,1 EAX: xsaveopt xsavec xgetbv1 xsaves xfd
        0x12,0 EAX: sgx1 sgx2 -9 sgx-edeccssa
        0x12,0 EBX: sgx-exinfo
        0x12,1 EAX: - sgx-debug sgx-mode64 - sgx-provisionkey sgx-tokenkey - sgx-kss -2 sgx-aex-notify
        0x14,0 ECX: -31 intel-pt-lip
        0x24,0 EBX: -16 avx10-128 avx10-256 avx10-512
        0x40000001 EDX: kvm-hint-dedicated
        0x80000001 ECX: lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop
          skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb
        0x80000001 EDX: -11 syscall -8 nx/xd - mmxext -2 ffxsr/fxsr-opt pdpe1gb rdtscp - i64/lm 3dnowext 3dnow
        0x80000007 EBX: overflow-recov succor
        0x80000007 EDX: -8 invtsc
        0x80000008 EBX: clzero - xsaveerptr -6 wbnoinvd -2 ibpb - ibrs amd-stibp - stibp-always-on -6 amd-ssbd
          virt-ssbd amd-no-ssb - amd-psfd
        0x8000000a EDX: npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists -2 pause-filter -
          pfthreshold avic - v-vmsave-vmload vgif -8 vnmi -2 svme-addr-chk
        0x80000021 EAX: no-nested-data-bp - lfence-always-serializing -3 null-sel-clr-base - auto-ibrs -15 eraps -2
          sbpb ibpb-brtype srso-no srso-user-kernel-no
        0x80000022 EAX: perfmon-v2
        0xc0000001 EDX: -2 xstore xstore-en -2 xcrypt xcrypt-en ace2 ace2-en phe phe-en pmm pmm-en
        """
}

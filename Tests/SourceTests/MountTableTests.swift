import Testing

@testable import Source

struct MountTableTests {
    @Test func namesWithBlanksAndOptionalFieldsAreRead() throws {
        let text = """
            36 35 98:0 /a\\040b.raw /vm/disk\\011x rw,noatime master:1 shared:2 - ext4 /dev/root rw
            37 35 0:41 / /proc rw - proc proc rw
            damaged line
            """
        let mounts = MountTable(parsing: Array(text.utf8)).mounts
        #expect(mounts.map(\.root) == ["/a b.raw", "/"])
        #expect(mounts.map(\.point) == ["/vm/disk\tx", "/proc"])
        #expect(mounts.map(\.type) == ["ext4", "proc"])
    }
}

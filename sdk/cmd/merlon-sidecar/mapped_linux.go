// The pages of the program's own file.

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// forgetProgram unmaps what of the program is in memory: most of it only the start
// has needed, as packages set themselves up. What is needed again the kernel maps
// again, as a rule from its cache.
func forgetProgram() error {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer f.Close()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	return programIn(f, exe, func(from, to uintptr) error {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
		return nil
	})
}

// programIn calls do for each mapping in smaps of the file exe that nobody can write to
// and nobody has written to: what the file has of it is all that there is.
func programIn(smaps io.Reader, exe string, do func(from, to uintptr) error) error {
	var from, to uintptr
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		switch {
		case len(fields) >= 5 && strings.Contains(fields[0], "-"):
			from, to = 0, 0
			if len(fields) == 6 && fields[5] == exe && !strings.Contains(fields[1], "w") {
				if _, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil {
					return err
				}
			}
		case len(fields) == 3 && fields[0] == "Anonymous:" && fields[1] == "0" && from < to:
			if err := do(from, to); err != nil {
				return err
			}
		}
	}
	return lines.Err()
}

// Package coredump keeps what a process holds in memory, private keys above all,
// out of the files that a crash leaves, and from other processes of its user.
package coredump

import (
	"fmt"
	"sync/atomic"
	"syscall"
)

// before is the limit of who called Limit.
var before atomic.Pointer[syscall.Rlimit]

// Forbid is for a process that starts no other and that nobody has to look into:
// the kernel writes no image of it, also for a program that collects those, and
// refuses its memory, environment and files to other processes of its user.
func Forbid() error {
	if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := hide(); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	return nil
}

// Limit is for a process that an agent of its own user must be able to look into:
// the kernel writes no image of it to a file. Processes that it starts inherit that,
// until Restore.
func Limit() error {
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_CORE, &was); err != nil {
		return fmt.Errorf("read the limit of core dumps: %w", err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{Max: was.Max}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	before.Store(&was)
	return nil
}

// Restore gives a child process the limit that Limit found, where it was called.
func Restore(pid int) error {
	was := before.Load()
	if was == nil {
		return nil
	}
	if err := setLimit(pid, was); err != nil {
		return fmt.Errorf("allow core dumps of process %d: %w", pid, err)
	}
	return nil
}

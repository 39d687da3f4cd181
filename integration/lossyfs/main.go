// Command lossyfs is a file system in memory, by FUSE, that loses what was not synced:
// content until fsync, fdatasync or msync of the file, names until fsync of their
// folder. It is a Go module of its own, so that Merlon does not depend on FUSE.
//
//	lossyfs PATH
//
// mounts it at PATH and takes commands from its standard input, each answered by a
// line, "ok" with what was lost, or "error":
//
//	sync        makes everything durable
//	cut         takes the power: what is not durable is gone, and every operation fails
//	cut SEED    the same, but some of what was not durable is kept
//	mount       gives it back, under a new mount
//
// It ends, and the mount with it, when its standard input does.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: lossyfs PATH")
		os.Exit(2)
	}
	h := host{path: os.Args[1], disk: newDisk()}
	err := h.mount()
	answer("", err)
	if err != nil {
		os.Exit(1)
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		answer(h.do(strings.Fields(lines.Text())))
	}
	if err := h.unmount(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func answer(what string, err error) {
	if err != nil {
		fmt.Println("error", err)
		return
	}
	fmt.Println("ok", what)
}

// host is the machine that the disk is in.
type host struct {
	path   string
	disk   *disk
	server *fuse.Server // nil: not mounted
}

func (h *host) do(command []string) (string, error) {
	if len(command) == 0 {
		return "", errors.New("an empty command")
	}
	switch command[0] {
	case "sync":
		h.disk.mu.Lock()
		defer h.disk.mu.Unlock()
		h.disk.syncAll()
		return "", nil
	case "cut":
		var some *rand.Rand
		if len(command) > 1 {
			seed, err := strconv.ParseUint(command[1], 10, 64)
			if err != nil {
				return "", fmt.Errorf("cut: %w", err)
			}
			some = rand.New(rand.NewPCG(seed, 0))
		}
		l := h.disk.cut(some)
		return fmt.Sprintf("%d operations on names, %d pages of %d files lost", l.operations, l.pages, l.files), nil
	case "mount":
		if err := h.unmount(); err != nil {
			return "", err
		}
		h.disk.on()
		return "", h.mount()
	}
	return "", fmt.Errorf("there is no command %q", command[0])
}

func (h *host) mount() (err error) {
	if h.server, err = h.disk.mount(h.path); err != nil {
		return fmt.Errorf("mount at %s (it needs root and /dev/fuse): %w", h.path, err)
	}
	return nil
}

// unmount waits a while for who still has files open, which are read no more.
func (h *host) unmount() (err error) {
	if h.server == nil {
		return nil
	}
	for range 500 {
		if err = h.server.Unmount(); err == nil {
			h.server = nil
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.Join(err, syscall.Unmount(h.path, syscall.MNT_DETACH))
}

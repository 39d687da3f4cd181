// Package systemd is what Merlon's daemons and the service manager say to each
// other: that a daemon is ready, reads its settings again, stops, or still lives, which sockets were
// opened for it, and what a hangup means. Where no service manager listens, nothing
// is said.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Manager is the service manager that started this process. Its zero value is
// of no use; a nil Manager is none, and nothing is said to it.
type Manager struct {
	log      *slog.Logger
	watchdog time.Duration // 0: nobody watches
	hangups  chan os.Signal
}

// Open reads from the environment what the service manager wants to hear. The
// environment is left without what is for this process alone.
func Open(log *slog.Logger) (*Manager, error) {
	watchdog, err := daemon.SdWatchdogEnabled(true)
	if err != nil {
		return nil, fmt.Errorf("read what systemd says of its watchdog: %w", err)
	}
	m := &Manager{log: log, watchdog: watchdog, hangups: make(chan os.Signal, 1)}
	signal.Notify(m.hangups, syscall.SIGHUP)
	return m, nil
}

// Hangups says in the log what SIGHUP does, which is nothing, until ctx ends. Many
// daemons read their settings again then; one that ends instead is not even started
// again, because systemd takes that for an end as it should be.
func (m *Manager) Hangups(ctx context.Context) {
	if m == nil {
		return
	}
	defer signal.Stop(m.hangups)
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.hangups:
			m.log.LogAttrs(ctx, slog.LevelWarn, "SIGHUP changes nothing: settings are read at the start; restart to have them read again")
		}
	}
}

// Ready says that the daemon does its work from now on.
func (m *Manager) Ready(status string) { m.say(daemon.SdNotifyReady + "\nSTATUS=" + status) }

// Reloading says that the daemon reads its settings again; Ready has to follow. The
// time tells systemd (Type=notify-reload) which of its requests is being answered.
func (m *Manager) Reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return // there is no such kernel
	}
	m.say(fmt.Sprintf("%s\nMONOTONIC_USEC=%d\nSTATUS=reading settings", daemon.SdNotifyReloading, now.Nano()/1000))
}

// Status says in a few words what the daemon does.
func (m *Manager) Status(status string) { m.say("STATUS=" + status) }

// Stopping says that the daemon ends.
func (m *Manager) Stopping() { m.say(daemon.SdNotifyStopping + "\nSTATUS=stopping") }

func (m *Manager) say(state string) {
	if m == nil {
		return
	}
	if _, err := daemon.SdNotify(false, state); err != nil {
		m.log.LogAttrs(context.Background(), slog.LevelWarn, "systemd was not told", slog.String("state", state), slog.Any("err", err))
	}
}

// Watch tells the watchdog that the daemon lives, for as long as alive says so,
// until ctx ends. alive is asked twice as often as systemd wants to hear of it,
// and has that long to answer.
func (m *Manager) Watch(ctx context.Context, alive func(context.Context) error) {
	if m == nil || m.watchdog <= 0 {
		return
	}
	period := m.watchdog / 2
	beat := time.NewTicker(period)
	defer beat.Stop()
	for {
		asked, cancel := context.WithTimeout(ctx, period)
		err := alive(asked)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			m.log.LogAttrs(ctx, slog.LevelError, "watchdog is not told that the daemon lives", slog.Any("err", err))
		} else {
			m.say(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		}
	}
}

// Sockets are the Unix sockets that were opened for this process, by path.
type Sockets map[string]*net.UnixListener

// TakeSockets takes the sockets that systemd opened for this process. They stay
// when it ends: closing one removes nothing. Anything else that was passed is
// an error, for it would be served by nobody.
func TakeSockets() (Sockets, error) {
	taken := Sockets{}
	var errs []error
	for _, f := range activation.Files(true) {
		errs = append(errs, taken.take(f))
	}
	if err := errors.Join(errs...); err != nil {
		taken.Close()
		return nil, fmt.Errorf("take the sockets of systemd: %w", err)
	}
	return taken, nil
}

func (s Sockets) take(f *os.File) error {
	defer f.Close() // the listener has its own
	lis, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("%s: not a socket that listens: %w", f.Name(), err)
	}
	u, ok := lis.(*net.UnixListener)
	if !ok {
		lis.Close()
		return fmt.Errorf("%s: a socket of %s, and only Unix sockets are served: remove it from the .socket unit", f.Name(), lis.Addr().Network())
	}
	path := lis.Addr().String()
	if s[path] != nil {
		lis.Close()
		return fmt.Errorf("%s: %s was passed twice", f.Name(), path)
	}
	s[path] = u
	return nil
}

// Close closes what nobody took out of s.
func (s Sockets) Close() {
	for _, lis := range s {
		lis.Close()
	}
}

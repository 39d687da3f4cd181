// `merlon-sidecar capture`: has connections go through the sidecar whether the app
// knows of it or not (package capture).

package sidecar

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os/user"
	"strconv"
	"strings"

	"merlon.dev/sdk/settings"
	"merlon.dev/sdk/sidecar/capture"
)

// ErrNotInForce is what RunCapture returns from a check that found something missing.
var ErrNotInForce = capture.ErrMissing

const captureUsage = `merlon-sidecar capture sends the connections of an app to its sidecar, whether the app
knows of it or not: by rules of nftables or iptables, for IPv4 and IPv6, which are put
in force and removed in one step and touch no others. It needs CAP_NET_ADMIN. Rules end
with the machine, or the pod: install them before the app starts.

  merlon-sidecar capture install FLAGS   put the rules of FLAGS in force, in the place of others of ours
  merlon-sidecar capture check FLAGS     say what of them is not in force; then the exit status is 3
  merlon-sidecar capture remove          remove them

Examples:
  merlon-sidecar capture install -sidecar-user orders-sidecar -inbound 8080:8443 -outbound-port 15001 -exclude-user root
  merlon-sidecar capture install -sidecar-user web-sidecar -app-user web -outbound-port 15001 -exclude-net 10.9.0.0/16,fd00:9::/64

Flags:
`

// RunCapture does what args say, the words after "capture". It prints its findings to
// out; flag.ErrHelp means that help was asked for and printed to usage. A mistake in args
// is one that [IsUsage] knows.
func RunCapture(ctx context.Context, args []string, out, usage io.Writer) error {
	verb := ""
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	set := flag.NewFlagSet("merlon-sidecar capture", flag.ContinueOnError)
	set.SetOutput(io.Discard) // the caller reports mistakes, once
	f := newCaptureFlags(set)
	help := func() error {
		fmt.Fprint(usage, captureUsage)
		set.SetOutput(usage)
		set.PrintDefaults()
		return flag.ErrHelp
	}
	if verb == "-h" || verb == "-help" || verb == "--help" {
		return help()
	}
	if err := set.Parse(args); errors.Is(err, flag.ErrHelp) {
		return help()
	} else if err != nil {
		return program.Mistake(err)
	}
	if set.NArg() > 0 {
		return program.Mistake(fmt.Errorf("unexpected argument %q", set.Arg(0)))
	}
	switch verb {
	case "install":
		return f.install(ctx, out)
	case "check":
		return f.check(ctx, out)
	case "remove":
		if set.NFlag() > 0 {
			return program.Mistake(errors.New("remove takes no flags: it removes all that install has made"))
		}
		if err := capture.Remove(ctx); err != nil {
			return err
		}
		_, err := fmt.Fprintln(out, "nothing is captured")
		return err
	}
	return program.Mistake(fmt.Errorf("capture %q: the verbs are install, check and remove", verb))
}

// IsUsage says whether err is a mistake in the command line itself.
func IsUsage(err error) bool {
	if _, ok := errors.AsType[*capture.InvalidError](err); ok {
		return true
	}
	_, ok := errors.AsType[*settings.UsageError](err)
	return ok
}

// captureFlags are those of install and check.
type captureFlags struct {
	backend string
	rules   capture.Rules
}

func newCaptureFlags(set *flag.FlagSet) *captureFlags {
	f := &captureFlags{backend: capture.Auto, rules: capture.Rules{UDP: capture.UDPDNS}}
	r := &f.rules
	set.StringVar(&f.backend, "backend", f.backend, "`nftables`, iptables, or auto: nftables where it works")
	set.Func("sidecar-user", "`user` that the sidecar runs as, by name or number, whose connections are never captured", func(v string) error {
		uids, err := usersOf(v)
		if err == nil && len(uids) != 1 {
			err = errors.New("it is one user")
		}
		if err == nil {
			r.SidecarUID = uids[0]
		}
		return err
	})
	set.Func("outbound-port", "`port` of the sidecar on 127.0.0.1 and ::1 that takes what apps connect to (captured_port in its settings)", func(v string) (err error) {
		r.OutboundPort, err = portOf(v)
		return err
	})
	set.Func("inbound", "comma-separated `APP:SIDECAR`, such as 8080:8443: ports of the app, which others reach through those of the sidecar alone", func(v string) (err error) {
		r.Inbound, err = inboundOf(v)
		return err
	})
	set.Func("app-user", "comma-separated `users` whose connections are captured (default: all but those of the next flag)", func(v string) (err error) {
		r.AppUIDs, err = usersOf(v)
		return err
	})
	set.Func("exclude-user", "comma-separated `users` whose connections are not captured, such as that of merlon-agent", func(v string) (err error) {
		r.ExcludeUIDs, err = usersOf(v)
		return err
	})
	set.Func("exclude-net", "comma-separated `networks`, such as 10.9.0.0/16, to which connections are not captured", func(v string) (err error) {
		r.ExcludeNets, err = netsOf(v)
		return err
	})
	set.Func("udp", "what becomes of captured users' UDP, which the sidecar does not take: `allow`, dns (all but port 53 is dropped, the default) or drop", func(v string) error {
		r.UDP = capture.UDP(v)
		return nil
	})
	return f
}

func (f *captureFlags) install(ctx context.Context, out io.Writer) error {
	backend, err := capture.Install(ctx, f.backend, f.rules)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "capture is in force, by %s\n", backend)
	return err
}

func (f *captureFlags) check(ctx context.Context, out io.Writer) error {
	missing, err := capture.Check(ctx, f.backend, f.rules)
	if err != nil {
		return err
	}
	if len(missing) == 0 {
		_, err := fmt.Fprintln(out, "capture is in force")
		return err
	}
	for _, sentence := range missing {
		fmt.Fprintln(out, sentence)
	}
	return ErrNotInForce
}

func portOf(v string) (uint16, error) {
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port", v)
	}
	return uint16(n), nil
}

func inboundOf(v string) (all []capture.Inbound, err error) {
	for _, pair := range settings.List(v) {
		app, sidecar, _ := strings.Cut(pair, ":")
		var in capture.Inbound
		if in.App, err = portOf(app); err == nil {
			in.Sidecar, err = portOf(sidecar)
		}
		if err != nil {
			return nil, fmt.Errorf("%q is not APP:SIDECAR, such as 8080:8443", pair)
		}
		all = append(all, in)
	}
	return all, nil
}

// usersOf are the numbers of users that are named, or given by number.
func usersOf(v string) (uids []uint32, err error) {
	for _, name := range settings.List(v) {
		text := name
		if _, err := strconv.ParseUint(name, 10, 32); err != nil {
			found, err := user.Lookup(name)
			if err != nil {
				return nil, fmt.Errorf("there is no user %q on this machine", name)
			}
			text = found.Uid
		}
		uid, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("user %q has no number", name)
		}
		uids = append(uids, uint32(uid))
	}
	return uids, nil
}

func netsOf(v string) (nets []netip.Prefix, err error) {
	for _, text := range settings.List(v) {
		prefix, err := netip.ParsePrefix(text)
		if addr, alone := netip.ParseAddr(text); alone == nil {
			prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil {
			return nil, fmt.Errorf("%q is no network, such as 10.9.0.0/16", text)
		}
		nets = append(nets, prefix)
	}
	return nets, nil
}

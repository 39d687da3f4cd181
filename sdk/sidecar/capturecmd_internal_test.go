// The words of `merlon-sidecar capture`.

package sidecar

import (
	"errors"
	"flag"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"merlon.dev/sdk/sidecar/capture"
)

func TestCaptureFlags(t *testing.T) {
	set := flag.NewFlagSet("", flag.ContinueOnError)
	f := newCaptureFlags(set)
	args := "-backend iptables -sidecar-user 4242 -outbound-port 15001 -inbound 8080:8443,9090:9443 -app-user root,1000 -exclude-user 7 -exclude-net 10.0.0.0/8,fd00::1 -udp drop"
	if err := set.Parse(strings.Fields(args)); err != nil {
		t.Fatal(err)
	}
	want := capture.Rules{
		SidecarUID: 4242, OutboundPort: 15001, Inbound: []capture.Inbound{{App: 8080, Sidecar: 8443}, {App: 9090, Sidecar: 9443}},
		AppUIDs: []uint32{0, 1000}, ExcludeUIDs: []uint32{7}, UDP: capture.UDPDrop,
		ExcludeNets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::1/128")},
	}
	if diff := cmp.Diff(want, f.rules, cmpopts.EquateComparable(netip.Prefix{})); diff != "" || f.backend != capture.IPTables {
		t.Errorf("backend %s (-want +got):\n%s", f.backend, diff)
	}
}

func TestMistakesInCapture(t *testing.T) {
	const sound = " -sidecar-user 4242 -outbound-port 15001"
	for args, want := range map[string]string{
		"":                                    "the verbs are install, check and remove",
		"start":                               `"start"`,
		"install now" + sound:                 "invalid",
		"install" + sound + " now":            `unexpected argument "now"`,
		"install" + sound + " -port 1":        "-port",
		"install":                             "outbound-port: is missing",
		"install -outbound-port 15001":        "sidecar-user: is root",
		"install" + sound + " -udp maybe":     `udp: "maybe"`,
		"install" + sound + " -backend pf":    `backend: "pf"`,
		"install" + sound + " -inbound 80":    "APP:SIDECAR",
		"install" + sound + " -inbound 0:1":   "APP:SIDECAR",
		"install" + sound + " -exclude-net x": "no network",
		"check -outbound-port 65536":          "no port",
		"check -sidecar-user no.such.user":    "there is no user",
		"check -sidecar-user 1,2":             "one user",
		"check -app-user 4294967296":          "there is no user",
		"remove" + sound:                      "takes no flags",
	} {
		err := RunCapture(t.Context(), strings.Fields(args), io.Discard, io.Discard)
		if args == "install now"+sound { // flags after a word are words
			want = "unexpected argument"
		}
		if err == nil || !IsUsage(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want a mistake with %q", args, err, want)
		}
	}
	var usage strings.Builder
	for _, args := range []string{"-h", "install -h"} {
		usage.Reset()
		if err := RunCapture(t.Context(), strings.Fields(args), io.Discard, &usage); !errors.Is(err, flag.ErrHelp) || !strings.Contains(usage.String(), "-exclude-net") {
			t.Errorf("%q: %v, and help %q", args, err, usage.String())
		}
	}
}

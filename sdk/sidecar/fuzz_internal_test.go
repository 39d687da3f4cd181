package sidecar

import (
	"testing"

	"merlon.dev/sdk/settings"
)

// Whatever is in the file, settings are taken or refused.
func FuzzConfig(f *testing.F) {
	for _, s := range []string{validConfig, "", "inbound: [{}]", "outbound: [{captures: [\"10.0.0.0/8:*\"], to: a, upstreams: [\"a:1\"], protocol: grpc}]\ncaptured_port: 15001\n", "a: &a [*a]"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := settings.Parse[Config]("sidecar.yaml", text)
		if err != nil {
			return
		}
		if cfg.Validate() == nil && len(cfg.Inbound)+len(cfg.Outbound) == 0 {
			t.Fatalf("%q is valid, and does nothing", text)
		}
	})
}

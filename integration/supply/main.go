// Command supply says what Merlon's binaries are made of, and whether any of it is
// known to be vulnerable.
//
//	supply sbom BINARY…         a CycloneDX document for each, BINARY.cdx.json beside it
//	supply vulnerable DATABASE  looks the repository's modules up in a vulnerability
//	                            database (https://vuln.go.dev, file:///path)
//
// README.md of this folder says what else is checked.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "supply: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) >= 2 && args[0] == "sbom":
		licences, err := readLicences()
		if err != nil {
			return err
		}
		for _, binary := range args[1:] {
			document, err := sbom(binary, licences)
			if err != nil {
				return err
			}
			if err := os.WriteFile(binary+".cdx.json", document, 0o644); err != nil {
				return err
			}
		}
		return nil
	case len(args) == 2 && args[0] == "vulnerable":
		return vulnerable(ctx, args[1], os.Stdout)
	}
	return fmt.Errorf("use: supply sbom BINARY…, or supply vulnerable DATABASE")
}

// root is the repository, seen from where go run and go test put us.
func root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "integration", "supply", "licences.txt")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find the repository: run this in it")
}

"""Data sets: each turns its own layout into records; ``MedicalDataModule`` splits, decodes, caches and serves them.

A data set outside this project needs no registration; the configuration names its class by its full path.
"""

from datamodules.base import MedicalDataModule as MedicalDataModule
from datamodules.image_folder import ImageFolderDataModule as ImageFolderDataModule
from datamodules.images.colour_preset import ColourPreset as ColourPreset
from datamodules.images.presets import BreastPreset as BreastPreset
from datamodules.images.presets import ChestPreset as ChestPreset
from datamodules.images.presets import PlainPreset as PlainPreset
from datamodules.labels_csv.datamodule import LabelsCSVDataModule as LabelsCSVDataModule
from datamodules.phantom.datamodule import PhantomDataModule as PhantomDataModule
from datamodules.phantom.sites import PhantomSite as PhantomSite
from datamodules.public.cbis_ddsm import CBISDDSMDataModule as CBISDDSMDataModule
from datamodules.public.cmmd import CMMDDataModule as CMMDDataModule
from datamodules.public.covid_chestxray import CovidChestXrayDataModule as CovidChestXrayDataModule
from datamodules.public.covid_qu_ex import CovidQuExDataModule as CovidQuExDataModule
from datamodules.public.inbreast import INbreastDataModule as INbreastDataModule
from datamodules.public.kermany import KermanyDataModule as KermanyDataModule
from datamodules.public.mini_mias import MiniMIASDataModule as MiniMIASDataModule
from datamodules.public.qata_cov19 import QaTaCov19DataModule as QaTaCov19DataModule
from datamodules.public.rsna_pneumonia import RSNAPneumoniaDataModule as RSNAPneumoniaDataModule
from datamodules.public.vindr_cxr import VinDrCXRDataModule as VinDrCXRDataModule
from datamodules.public.vindr_mammo import VinDrMammoDataModule as VinDrMammoDataModule
